"""Processes under ``mlx.launch`` watch each other, so that none waits for one that is gone.

An MLX collective waits forever for a process that hangs, and in some versions for one that died
(ml-explore/mlx issues 3862, 4475); the launcher notices neither. So each process has a thread that
is connected to both neighbours in a ring, sends a heartbeat every second and listens for theirs.
Heartbeats continue while the process computes, loads or validates, however long that takes. The
process ends, with a one-sentence error, when

- a neighbour's connection closes without a farewell: it was killed, or crashed;
- a neighbour has been silent for ``SILENCE`` seconds: it is stopped, or the network is down;
- all have been in the same collective for ``STUCK`` seconds: MLX is deadlocked.

A failure in any process is sent to all and ends all with the same exit code. It is printed once, by
the first process if that is alive.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tlora_mlx.distributed import collectives
from tlora_mlx.errors import last_line

BEAT = 1.0
SILENCE = 30.0
STUCK = 30.0
# How long a process may keep running once all should end: the first one may be saving.
GRACE = 20.0
# How long a process that ends waits for the others to learn of it.
FAREWELL = 5.0
TICK = 0.2
PAUSE = 3.0
RESUME_HINT = "what was saved is intact; tlora_mlx.train --resume continues from it"


@dataclass
class _Link:
    """A neighbour: its number, when it was last heard from, and its incomplete message, if any."""

    number: int
    heard: float
    rest: bytes = b""


@dataclass(frozen=True)
class _Failure:
    """Why all should end, as one process noticed it.

    Attributes:
        message: one sentence.
        begun: how many collectives the failed process had begun; it will join no more.
        seen: when this process learnt of it.
    """

    code: int
    message: str
    begun: int
    seen: float


@dataclass(frozen=True)
class _Ending:
    """How this process ends: its exit code, why, and until when it waits for the others."""

    code: int
    message: str
    deadline: float


class Watch:
    """Watches the other processes; all its state belongs to its thread.

    The first process decides why all end, and with which exit code; if it is lost, its neighbours
    decide. The others give it time for that, since it may be saving.

    Args:
        links: a connection to each neighbour, and the neighbour's number.
        names: what messages call each process.
    """

    def __init__(self, links: list[tuple[socket.socket, int]], names: list[str]):
        self._rank, self._names = collectives.rank(), names
        now = time.monotonic()
        self._links = {link: _Link(number, now) for link, number in links}
        self._begun = [0] * len(names)
        self._common = (0, now)  # the collective that all are in, and since when
        self._next_beat = self._last_check = now
        self._decides = self._rank == 0
        self._failure: _Failure | None = None
        self._verdict_sent = False  # whether this process has made or received the verdict
        self._ending: _Ending | None = None
        self._request: tuple[int, str] | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def leave(self, code: int, message: str) -> int:
        """End this process's part, called from its main thread; returns the exit code.

        A failure ends the others too. After a success, all but the first process wait to see how
        the first one ends.

        Args:
            code: exit code.
            message: what failed, in one sentence; printed once for all processes.
        """
        self._request = (code, message)
        self._done.wait()
        if code and not self._ending.code:  # the first process had already ended successfully
            _print_ending(code, message)
            return code
        return self._ending.code

    def _run(self) -> None:
        while not self._is_done():
            self._beat()
            for link in select.select(list(self._links), [], [], TICK)[0]:
                self._receive(link)
            if self._ending is None:
                self._check_others()
                self._decide()
        for link in self._links:
            link.close()
        if not self._verdict_sent:
            _print_ending(self._ending.code, self._ending.message)
        if self._ending.code and self._request is None:
            os._exit(self._ending.code)  # the main thread may be stuck inside MLX
        self._done.set()

    def _is_done(self) -> bool:
        return self._ending is not None and (
            not self._links or time.monotonic() > self._ending.deadline
        )

    def _beat(self) -> None:
        self._begun[self._rank] = collectives.begun
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT
            self._send({"begun": self._begun})

    def _send(self, message: dict[str, Any]) -> None:
        for link in self._links:
            with suppress(OSError):  # a closed connection is noticed when it is read
                link.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self, link: socket.socket) -> None:
        neighbour = self._links[link]
        try:
            data = link.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            link.close()
            del self._links[link]
            self._lost(neighbour.number, "ended unexpectedly")
            return
        neighbour.heard = time.monotonic()
        *lines, neighbour.rest = (neighbour.rest + data).split(b"\n")
        for line in lines:
            self._on_message(json.loads(line))

    def _on_message(self, message: dict[str, Any]) -> None:
        if "begun" in message:
            self._begun = list(map(max, self._begun, message["begun"]))
        elif "word" in message:
            if not self._verdict_sent:
                self._ending = self._ending or _Ending(message["word"], "", _after(FAREWELL))
                self._send_verdict(message["word"])
        elif self._failure is None:
            code, text, begun = message["failure"]
            self._failure = _Failure(code, text, begun, time.monotonic())
            self._send(message)

    def _check_others(self) -> None:
        """Check whether a neighbour has fallen silent, or all wait for each other."""
        now = time.monotonic()
        if now - self._last_check > PAUSE:  # this process itself was stopped
            for neighbour in self._links.values():
                neighbour.heard = now
        self._last_check = now
        for neighbour in self._links.values():
            if now - neighbour.heard > SILENCE:
                what = "is stopped, or the network between the processes is down"
                self._lost(neighbour.number, f"has been silent for {SILENCE:.0f} s: it {what}")
        begun = collectives.begun
        if begun == collectives.ended or min(self._begun) < begun or self._common[0] != begun:
            self._common = (begun, now)
        elif now - self._common[1] > STUCK:
            what = f"all processes waited for each other for {STUCK:.0f} s: a deadlock in MLX's"
            self._fail(1, f"{what} communication; {RESUME_HINT}", -1)

    def _lost(self, number: int, how: str) -> None:
        self._decides |= number == 0
        self._fail(1, f"{self._names[number]} {how}; {RESUME_HINT}", -1)

    def _fail(self, code: int, message: str, begun: int) -> None:
        if self._failure is None and self._ending is None:
            self._failure = _Failure(code, message, begun, time.monotonic())
            reported = f"{message} (reported by {self._names[self._rank]})"
            self._send({"failure": (code, reported, begun)})

    def _decide(self) -> None:
        """Check whether it is time to end."""
        failure, request = self._failure, self._request
        if request and request[0]:
            if not self._decides:
                self._fail(*request, collectives.begun)
            self._end(*request)
        elif failure:
            inside = collectives.begun > max(collectives.ended, failure.begun)
            if request or inside or time.monotonic() > failure.seen + GRACE:
                self._end(failure.code, failure.message)
        elif request and self._rank == 0:
            self._end(*request)

    def _end(self, code: int, message: str) -> None:
        self._ending = _Ending(
            code, message, _after(FAREWELL if self._decides else GRACE + FAREWELL)
        )
        if self._decides:
            _print_ending(code, message)
            self._send_verdict(code)

    def _send_verdict(self, code: int) -> None:
        self._verdict_sent = True
        self._send({"word": code})
        for link in self._links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_WR)


def _after(seconds: float) -> float:
    return time.monotonic() + seconds


def _print_ending(code: int, message: str) -> None:
    if message:
        with suppress(OSError):  # the terminal is gone
            print(last_line(code, message), file=sys.stderr, flush=True)
