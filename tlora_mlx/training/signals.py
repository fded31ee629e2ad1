"""Ctrl-C and similar signals during training: all processes finish the current step first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tlora_mlx.distributed.collectives import largest


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list, so that the loop can finish its step first.

    A second signal goes straight to the previous handler. ssh turns a Ctrl-C at ``mlx.launch``
    into SIGHUP; if SIGHUP is ignored (nohup), it stays ignored.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {n: signal.signal(n, note) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def agreed(stops: list[int]) -> int:
    """The signal that this or any other process received, so that all stop after the same step."""
    return largest(stops[0] if stops else 0)
