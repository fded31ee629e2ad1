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
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora_mlx.errors import first_line
from tlora_mlx.method import distributed

BEAT = 1.0
SILENCE = 30.0
STUCK = 30.0
# How long a process may go on by itself when all are to end: the first one may be saving.
GRACE = 20.0
# How long a process that ends waits for the others to hear of it.
FAREWELL = 5.0
# How long the processes may take to find each other, and neighbours to connect after that.
START = 50.0
CONNECT = 15.0
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
        self._rank, self._names = distributed.rank(), names
        now = time.monotonic()
        self._links = {link: _Link(number, now) for link, number in links}
        self._begun = [0] * len(names)
        self._together = (0, now)  # the collective that all are in, and since when
        self._next_beat = self._looked = now
        self._speaks = self._rank == 0
        self._failure: _Failure | None = None
        self._word = False  # whether it was heard or said how all end
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
                self._judge()
        for link in self._links:
            link.close()
        if not self._word:
            _say(self._ending.message)
        if self._ending.code and self._request is None:
            os._exit(self._ending.code)  # the main thread may be inside of MLX for ever
        self._over.set()

    def _is_done(self) -> bool:
        return self._ending is not None and (
            not self._links or time.monotonic() > self._ending.deadline
        )

    def _beat(self) -> None:
        self._begun[self._rank] = distributed.begun
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
            self._hear(json.loads(line))

    def _hear(self, message: dict[str, Any]) -> None:
        if "begun" in message:
            self._begun = list(map(max, self._begun, message["begun"]))
        elif "word" in message:
            if not self._word:
                self._ending = self._ending or _Ending(message["word"], "", _after(FAREWELL))
                self._last_word(message["word"])
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
        begun = distributed.begun
        if begun == distributed.ended or min(self._begun) < begun or self._together[0] != begun:
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

    def _judge(self) -> None:
        """See whether it is time to end."""
        failure, request = self._failure, self._request
        if request and request[0]:
            if not self._speaks:
                self._fail(*request, distributed.begun)
            self._end(*request)
        elif failure:
            inside = distributed.begun > max(distributed.ended, failure.begun)
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
            self._last_word(code)

    def _last_word(self, code: int) -> None:
        self._word = True
        self._send({"word": code})
        for link in self._links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_WR)


def _after(seconds: float) -> float:
    return time.monotonic() + seconds


def _say(message: str) -> None:
    if message:
        with suppress(OSError):  # the terminal is gone
            print(f"error: {message}", file=sys.stderr, flush=True)


def start() -> Watch | None:
    """Connect this process to its neighbours and begin to watch; None where that is not possible.

    The addresses are those that the launcher gave; ports are the system's choice.
    """
    with _bounded(START):
        return _connect() if distributed.processes() > 1 else None


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """End this process, with a sentence, unless the block ends in time.

    MLX holds Python's lock while it looks for the others, for ever if need be, so no thread could
    do this: a child process does.
    """
    message = f"the processes did not find each other in {seconds:.0f} s; did all start?"
    script = 'sleep "$1"; [ "$(ps -o ppid= -p $$)" -eq "$2" ] && echo "error: $3" >&2 && kill "$2"'
    command = ["sh", "-c", script, "sh", str(seconds), str(os.getpid()), message]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _connect() -> Watch | None:
    rank, processes = distributed.rank(), distributed.processes()
    with socket.create_server(("", 0)) as server:
        mine = (_address(rank), server.getsockname()[1], secrets.token_hex(8), socket.gethostname())
        records = distributed.from_each(mine)
        left, right = (rank - 1) % processes, (rank + 1) % processes
        links, fault = [], None
        try:
            to_right = socket.create_connection(records[right][:2], CONNECT)
            links.append((to_right, right))
            to_right.sendall(records[right][2].encode())
            links.append((_accept(server, mine[2].encode()), left))
        except OSError as error:
            where = f"{records[right][0]}, port {records[right][1]}"
            fault = f"process {rank} and its neighbours ({where}): {first_line(error)}"
    faults = [fault for fault in distributed.from_each(fault) if fault]
    if not faults:
        return Watch(links, [f"process {n} on {record[3]}" for n, record in enumerate(records)])
    for link, _ in links:
        link.close()
    if rank == 0:
        print(
            "warning: the processes cannot watch each other, so if one dies, end the others "
            f"yourself: no connection between {faults[0]}",
            file=sys.stderr,
        )
    return None


def _accept(server: socket.socket, token: bytes) -> socket.socket:
    """The connection of whoever knows the token."""
    end = time.monotonic() + CONNECT
    while True:
        server.settimeout(max(0.1, end - time.monotonic()))
        link, _ = server.accept()
        link.settimeout(CONNECT)
        with suppress(OSError):
            if link.recv(len(token), socket.MSG_WAITALL) == token:
                return link
        link.close()


def _address(rank: int) -> str:
    """Where the left neighbour reaches this process."""
    if path := os.environ.get("MLX_HOSTFILE"):  # the ring: addresses of each process
        return json.loads(Path(path).read_text())[rank][0].rsplit(":", 1)[0]
    coordinator = os.environ.get("MLX_JACCL_COORDINATOR")  # the first process's address
    if coordinator is None:  # MPI
        return socket.gethostname()
    host, port = coordinator.rsplit(":", 1)
    if rank == 0:
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing, but chooses the way there
        return probe.getsockname()[0]
