"""Running a model's code in a separate process, with limits, and in a sandbox where there is one.

What the limits cover: time, memory (not on macOS), the size of files, the number of processes on
Linux, a log that cannot grow or be replaced, no environment, and a result that exit codes, output
and files cannot forge. In the interpreter, connections and new processes are refused. What they do
not cover: a program that looks for the result's channel in the interpreter's own memory; and
without a sandbox (``sandbox.SANDBOXES``) it runs as you, and could do what you can.

Source of the limits: karpathy/nanochat, ``nanochat/execution.py``, after OpenAI's human-eval.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import which
from typing import BinaryIO

from tlora_mlx.evaluation.sandbox import SANDBOXES, Sandbox

# How much is read of what a program wrote to its error output.
MOST_LOGGED = 10_000
# A program that any sandbox has to let through: it writes a file, and starts a thread.
PROBE = """
import threading
open("file", "w").close()
thread = threading.Thread(target=int)
thread.start()
thread.join()
"""
# Runs in the child. Its input is the program's length, the program and a token, which it copies to
# its output when the program has run to its end. macOS rejects a memory limit below what the
# process has already mapped; only Linux counts threads as processes. The program's name must not be
# a file's: a traceback would read that file, and the program could put a device there.
_BOOTSTRAP = """
import glob, os, resource, sys
import _posixsubprocess
def limit(what, soft, hard):
    most = resource.getrlimit(what)[1]
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(what, (soft, hard))
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
limit(resource.RLIMIT_CPU, seconds, seconds + 1)
limit(resource.RLIMIT_FSIZE, 10_000_000, 10_000_000)
limit(resource.RLIMIT_CORE, 0, 0)
if sys.platform != "darwin":
    limit(resource.RLIMIT_AS, memory, memory)
    running = len(glob.glob("/proc/[0-9]*/task/*"))
    limit(resource.RLIMIT_NPROC, running + 32, running + 32)
size, program = int(os.read(0, 16)), b""
while len(program) < size:
    program += os.read(0, size - len(program))
token, result, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
os.dup2(null, 0)
os.dup2(null, 1)
program = compile(program.decode("utf-8", "surrogatepass"), "<program>", "exec")
refused = ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.send", "subprocess.",
           "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.spawn")
def hook(event, _):
    if event.startswith(refused):
        raise PermissionError(event + " is not allowed here")
def fork_exec(*_):
    hook("subprocess.fork_exec", ())
_posixsubprocess.fork_exec = fork_exec
sys.addaudithook(hook)
exec(program, {"__name__": "__main__"})
os.write(result, os.read(token, 64))
os._exit(0)
"""


@dataclass(frozen=True)
class Limits:
    """What a program may take: seconds, and GB of memory (not enforced on macOS)."""

    seconds: int = 10
    memory: float = 2.0


@cache
def best_sandbox() -> Sandbox:
    """The first sandbox of this machine in which a harmless program passes; else none."""
    existing = [sandbox for sandbox in SANDBOXES if sandbox.exists()]
    works = (s for s in existing[:-1] if run_program(PROBE, Limits(), s) == "passed")
    return next(works, existing[-1])


def run_program(program: str, limits: Limits, sandbox: Sandbox | None = None) -> str:
    """Run Python source; returns ``passed``, ``timed out``, or the last line of its error output.

    It runs in an empty directory that is deleted afterwards, in isolated mode, without environment
    and input. It may write files of up to 10 MB, but not open connections or start processes.

    Args:
        program: passes if it runs to its end.
        limits: what it may take.
        sandbox: to run it in; None: the best of this machine.
    """
    sandbox = sandbox or best_sandbox()
    source = program.encode("utf-8", "surrogatepass")
    token = secrets.token_bytes(32)
    python = [sys.executable, "-I", "-B", "-c", _BOOTSTRAP]
    python += [str(limits.seconds), str(int(limits.memory * 1e9))]
    # Files without a name: the program can neither replace nor delete what is read afterwards.
    with _directory() as place, _nameless() as input, _nameless() as result, _nameless() as log:
        input.write(f"{len(source):<16}".encode() + source + token)
        input.seek(0)
        first, *rest = sandbox.command(place, python)
        process = subprocess.Popen(
            [which(first) or first, *rest],
            cwd=place,
            env={"PATH": os.defpath, "HOME": str(place), "TMPDIR": str(place)},
            stdin=input,
            stdout=result,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            code = -signal.SIGXCPU
        finally:
            with contextlib.suppress(ProcessLookupError):  # and children that it left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):  # a sandbox adds 128
            return "timed out"
        result.seek(0)
        if secrets.compare_digest(result.read(len(token)), token):
            return "passed"
        log.seek(max(0, log.seek(0, os.SEEK_END) - MOST_LOGGED))
        lines = log.read(MOST_LOGGED).decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"ended early with exit code {code}"


def _nameless() -> BinaryIO:
    return tempfile.TemporaryFile(buffering=0)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """An empty directory, deleted afterwards, however deep and locked what is in it may be."""
    place = Path(os.path.realpath(tempfile.mkdtemp(prefix="tlora-code-")))
    try:
        yield place
    finally:
        # Not shutil.rmtree, which recurses: the program may have nested thousands of directories.
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", place], stderr=subprocess.DEVNULL, check=False)
