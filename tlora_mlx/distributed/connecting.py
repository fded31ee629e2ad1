"""How processes under ``mlx.launch`` connect to their ring neighbours, to watch each other."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tlora_mlx.distributed import collectives
from tlora_mlx.distributed.watch import Watch
from tlora_mlx.errors import first_line

# Seconds that the processes may take to find each other, and neighbours to connect after that.
START = 50.0
CONNECT = 15.0


def start() -> Watch | None:
    """Connect this process to its neighbours and start watching; None if that is not possible.

    The addresses come from the launcher; the system chooses the ports.
    """
    with _bounded(START):
        return _connect() if collectives.processes() > 1 else None


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """End this process, with an error message, unless the block finishes in time.

    MLX holds Python's lock while it looks for the others, possibly forever, so a thread could not
    do this; a child process does.
    """
    message = f"the processes did not find each other within {seconds:.0f} s; did they all start?"
    script = 'sleep "$1"; [ "$(ps -o ppid= -p $$)" -eq "$2" ] && echo "error: $3" >&2 && kill "$2"'
    command = ["sh", "-c", script, "sh", str(seconds), str(os.getpid()), message]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _connect() -> Watch | None:
    rank, processes = collectives.rank(), collectives.processes()
    with socket.create_server(("", 0)) as server:
        mine = (_address(rank), server.getsockname()[1], secrets.token_hex(8), socket.gethostname())
        records = collectives.from_each(mine)
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
    faults = [fault for fault in collectives.from_each(fault) if fault]
    if not faults:
        return Watch(links, [f"process {n} on {record[3]}" for n, record in enumerate(records)])
    for link, _ in links:
        link.close()
    if rank == 0:
        print(
            "warning: the processes cannot watch each other, so if one dies, stop the others "
            f"yourself: no connection between {faults[0]}",
            file=sys.stderr,
        )
    return None


def _accept(server: socket.socket, token: bytes) -> socket.socket:
    """The connection from the process that sends the token."""
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
    """The address at which the left neighbour reaches this process."""
    if path := os.environ.get("MLX_HOSTFILE"):  # the ring: each process's addresses
        return json.loads(Path(path).read_text())[rank][0].rsplit(":", 1)[0]
    coordinator = os.environ.get("MLX_JACCL_COORDINATOR")  # the first process's address
    if coordinator is None:  # MPI
        return socket.gethostname()
    host, port = coordinator.rsplit(":", 1)
    if rank == 0:
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing, but picks the local address
        return probe.getsockname()[0]
