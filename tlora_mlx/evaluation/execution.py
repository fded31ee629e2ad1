"""Running a model's code in a separate process, with limits.

The limits keep accidents (an endless loop, all memory used up, a full disk, a network request) from
doing harm. They are not a sandbox against malicious code: it runs as you.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# The child's exit code if the program has run to its end; sys.exit(0) before that gives another.
PASSED = 97

# Runs in the child. macOS rejects a memory limit below what the process has already mapped.
_BOOTSTRAP = """
import os, resource, sys
seconds, memory, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def limit(what, soft, hard):
    most = resource.getrlimit(what)[1]
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(what, (soft, hard))
limit(resource.RLIMIT_CPU, seconds, seconds + 1)
limit(resource.RLIMIT_FSIZE, 10_000_000, 10_000_000)
limit(resource.RLIMIT_CORE, 0, 0)
if sys.platform != "darwin":
    limit(resource.RLIMIT_AS, memory, memory)
with open(path, encoding="utf-8", errors="surrogatepass") as file:
    program = compile(file.read(), "program.py", "exec")
refused = ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.send", "subprocess.",
           "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
def hook(event, _):
    if event.startswith(refused):
        raise PermissionError(event + " is not allowed here")
sys.addaudithook(hook)
exec(program, {"__name__": "__main__"})
os._exit(PASSED)
""".replace("PASSED", str(PASSED))


@dataclass(frozen=True)
class Limits:
    """What a program may take: seconds, and GB of memory (not enforced on macOS)."""

    seconds: int = 10
    memory: float = 2.0


def run_program(program: str, limits: Limits) -> str:
    """Run Python source; returns ``passed``, ``timed out``, or the last line of its error output.

    It runs in an empty directory that is deleted afterwards, in isolated mode, without environment
    and input. It may write files of up to 10 MB, but not open connections or start processes.
    """
    with tempfile.TemporaryDirectory(prefix="tlora-code-") as place:
        path, errors = Path(place) / "program.py", Path(place) / "errors"
        path.write_text(program, encoding="utf-8", errors="surrogatepass")
        arguments = [str(limits.seconds), str(int(limits.memory * 1e9)), str(path)]
        with errors.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", _BOOTSTRAP, *arguments],
                cwd=place,
                env={"PATH": os.defpath, "HOME": place, "TMPDIR": place},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
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
        if code in (PASSED, -signal.SIGXCPU):
            return "passed" if code == PASSED else "timed out"
        lines = errors.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"ended early with exit code {code}"
