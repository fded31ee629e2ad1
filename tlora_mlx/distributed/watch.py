"""Processes under ``mlx.launch`` watch each other, so that none waits for one that is gone.

A collective of MLX waits for ever for a process that hangs, in some versions for one that died too
(ml-explore/mlx issues 3862, 4475), and the launcher sees neither. So each process has a thread that
holds a connection to either neighbour in a ring, sends a beat every second and listens for theirs:
beats go on while the process computes, loads or validates, however long that takes. The process
ends, with one sentence, when

- a neighbour's connection closes without a farewell: it was killed, or crashed;
- a neighbour has not been heard of for ``SILENCE`` seconds: it is stopped, or the network is down;
- all have been in the same collective for ``STUCK`` seconds: MLX is deadlocked.

A failure in any process is told to all, said once, by the first process where that is alive, and
ends all with the same exit code.
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

BEAT = 1.0
SILENCE = 30.0
STUCK = 30.0
# How long a process may go on by itself when all are to end: the first one may be saving.
GRACE = 20.0
# How long a process that ends waits for the others to hear of it.
FAREWELL = 5.0
TICK = 0.2
PAUSE = 3.0
SAVED = "what was saved is whole, and tlora_mlx.train --resume goes on from it"


@dataclass
class _Link:
    """What is known of a neighbour: its number, when it was heard of last, and half a message."""

    number: int
    heard: float
    rest: bytes = b""


@dataclass(frozen=True)
class _Failure:
    """Why all should end, as one process noticed it.

    Attributes:
        message: one sentence.
        begun: how many collectives the process had begun that failed; no more will be joined.
        seen: when this process learnt of it.
    """

    code: int
    message: str
    begun: int
    seen: float


@dataclass(frozen=True)
class _Ending:
    """How this process ends: its exit code, why, and how long the others are waited for."""

    code: int
    message: str
    deadline: float


class Watch:
    """One process's eye on the others; all its state belongs to its thread.

    The first process has the last word: it says why all end, and with which exit code; where it is
    lost, its neighbours do. It is given time to do so at leisure, since it may be saving.

    Args:
        links: a connection to either neighbour, and the neighbour's number.
        names: all processes, as they are called in messages.
    """

    def __init__(self, links: list[tuple[socket.socket, int]], names: list[str]):
        self._rank, self._names = collectives.rank(), names
        now = time.monotonic()
        self._links = {link: _Link(number, now) for link, number in links}
        self._begun = [0] * len(names)
        self._together = (0, now)  # the collective that all are in, and since when
        self._next_beat = self._looked = now
        self._speaks = self._rank == 0
        self._failure: _Failure | None = None
        self._verdict_sent = False  # whether it was heard or said how all end
        self._ending: _Ending | None = None
        self._request: tuple[int, str] | None = None
        self._over = threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def leave(self, code: int, message: str) -> int:
        """End this process's part, from its main thread; returns the exit code.

        A failure ends the others too. After a success, the processes beside the first wait for how
        that one ends.

        Args:
            code: exit code.
            message: what failed, in one sentence; said once for all processes.
        """
        self._request = (code, message)
        self._over.wait()
        if code and not self._ending.code:  # the first had ended well before
            _say(message)
            return code
        return self._ending.code

    def _run(self) -> None:
        while not self._is_done():
            self._beat()
            for link in select.select(list(self._links), [], [], TICK)[0]:
                self._receive(link)
            if self._ending is None:
                self._look()
                self._decide()
        for link in self._links:
            link.close()
        if not self._verdict_sent:
            _say(self._ending.message)
        if self._ending.code and self._request is None:
            os._exit(self._ending.code)  # the main thread may be inside of MLX for ever
        self._over.set()

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
            with suppress(OSError):  # that it is closed shows when it is read
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
            self._lost(neighbour.number, "ended without a word")
            return
        neighbour.heard = time.monotonic()
        *lines, neighbour.rest = (neighbour.rest + data).split(b"\n")
        for line in lines:
            self._on_message(json.loads(line))

    def _on_message(self, message: dict[str, Any]) -> None:
        if "begun" in message:
            self._begun = list(map(max, self._begun, message["begun"]))
        elif "verdict" in message:
            if not self._verdict_sent:
                self._ending = self._ending or _Ending(message["verdict"], "", _after(FAREWELL))
                self._send_verdict(message["verdict"])
        elif self._failure is None:
            code, text, begun = message["failure"]
            self._failure = _Failure(code, text, begun, time.monotonic())
            self._send(message)

    def _look(self) -> None:
        """See whether a neighbour has fallen silent, or all wait for each other."""
        now = time.monotonic()
        if now - self._looked > PAUSE:  # it was this process that was stopped, then
            for neighbour in self._links.values():
                neighbour.heard = now
        self._looked = now
        for neighbour in self._links.values():
            if now - neighbour.heard > SILENCE:
                what = "is stopped, or the network between the processes is down"
                self._lost(neighbour.number, f"was not heard of for {SILENCE:.0f} s: it {what}")
        begun = collectives.begun
        if begun == collectives.ended or min(self._begun) < begun or self._together[0] != begun:
            self._together = (begun, now)
        elif now - self._together[1] > STUCK:
            what = f"all processes waited for each other for {STUCK:.0f} s: a deadlock in MLX's"
            self._fail(1, f"{what} communication; {SAVED}", -1)

    def _lost(self, number: int, how: str) -> None:
        self._speaks |= number == 0
        self._fail(1, f"{self._names[number]} {how}; {SAVED}", -1)

    def _fail(self, code: int, message: str, begun: int) -> None:
        if self._failure is None and self._ending is None:
            self._failure = _Failure(code, message, begun, time.monotonic())
            self._send({"failure": (code, f"{message} (said by {self._names[self._rank]})", begun)})

    def _decide(self) -> None:
        """See whether it is time to end."""
        failure, request = self._failure, self._request
        if request and request[0]:
            if not self._speaks:
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
            code, message, _after(FAREWELL if self._speaks else GRACE + FAREWELL)
        )
        if self._speaks:
            _say(message)
            self._send_verdict(code)

    def _send_verdict(self, code: int) -> None:
        self._verdict_sent = True
        self._send({"verdict": code})
        for link in self._links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_WR)


def _after(seconds: float) -> float:
    return time.monotonic() + seconds


def _say(message: str) -> None:
    if message:
        with suppress(OSError):  # the terminal is gone
            print(f"error: {message}", file=sys.stderr, flush=True)
