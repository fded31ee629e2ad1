import socket
import struct
import sys
import time

import pytest

from tlora_mlx.evaluation.code_generation import is_python, metrics, solution
from tlora_mlx.evaluation.execution import Limits, best_sandbox, run_program
from tlora_mlx.evaluation.sandbox import SANDBOXES

HEADER = 'from typing import List\n\n\ndef double(x: int) -> int:\n    """Twice x."""\n'


@pytest.mark.parametrize(
    ("header", "response", "expected"),
    [
        # A base model goes on and then leaves the function.
        (HEADER, "    return 2 * x\n\n\ndef other():\n    pass\n", HEADER + "    return 2 * x\n"),
        (HEADER, "    return 2 * x\n\nprint(double(2))\n", HEADER + "    return 2 * x\n"),
        # A chat model writes it anew, or the body alone; the header's imports come along.
        (
            HEADER,
            "Sure:\n```python\ndef double(x: int) -> int:\n    return x + x\n```\nDone.",
            "from typing import List\n\n\ndef double(x: int) -> int:\n    return x + x\n",
        ),
        (HEADER, "```\n    return x + x\n```", HEADER + "    return x + x\n"),
        # A block that was cut off by the token limit.
        (HEADER, "```python\n    return x + x", HEADER + "    return x + x\n"),
        # MBPP has no header.
        (
            "",
            "```python\ndef f():\n    return 1\n```\n```python\nf()\n```",
            "def f():\n    return 1\n",
        ),
        ("", "def f():\n    return 1", "def f():\n    return 1\n"),
    ],
)
def test_solutions(header, response, expected):
    assert solution(header, response) == expected


def test_python_or_not():
    assert is_python(solution(HEADER, "    return 2 * x"))
    assert not is_python("def f(:\n")
    assert not is_python("\x00")


def test_metrics():
    outputs = [{"is_python": True, "outcome": "passed"}, {"is_python": False, "outcome": "Error"}]
    assert metrics([], outputs) == {"is_python": 0.5, "pass@1": 0.5}
    assert metrics([], [{"is_python": True}]) == {"is_python": 1.0}


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("assert 1 + 1 == 2\nif __name__ == '__main__':\n    x = 1\n", "passed"),
        ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "ended early with exit code 0"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("import os; assert os.environ.get('SECRET') is None and os.listdir() == []", "passed"),
        ("import os; os._exit(97)", "ended early with exit code 97"),
        (
            "import os; os.write(2, b'\\xff' * 9_000_000); assert 0, 'short'",
            "AssertionError: short",
        ),
        (
            "import multiprocessing as m; m.get_context('spawn').Process(target=int).start()",
            "PermissionError: subprocess.fork_exec is not allowed here",
        ),
        ("input()", "EOFError: EOF when reading a line"),
        ("open('big', 'wb').write(bytes(20_000_000))", "OSError: [Errno 27] File too large"),
        pytest.param(
            "x = bytearray(2_000_000_000)",
            "MemoryError",
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such limit"),
        ),
    ],
)
def test_programs_are_run_with_limits(monkeypatch, program, outcome):
    monkeypatch.setenv("SECRET", "1")
    seconds = 2 if outcome == "timed out" else 60  # a busy machine starts a program late
    assert run_program(program, Limits(seconds=seconds, memory=0.5)) == outcome


def test_no_network_and_no_processes():
    limits = Limits(seconds=5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket\nsocket.socket().connect({server.getsockname()!r})\n"
        assert "socket.connect is not allowed" in run_program(program, limits)
    for program in ("import subprocess; subprocess.run(['true'])", "import os; os.fork()"):
        assert "is not allowed here" in run_program(program, limits)
    assert run_program("import asyncio; asyncio.run(asyncio.sleep(0))", limits) == "passed"


def sandboxes():
    """Those of this machine, and running without one."""
    return [s for s in SANDBOXES if s is SANDBOXES[-1] or s is best_sandbox()]


@pytest.mark.parametrize("sandbox", sandboxes(), ids=lambda sandbox: str(sandbox.name))
def test_what_a_program_cannot_do_to_us(sandbox, tmp_path, monkeypatch):
    """Whatever it leaves is deleted, and what it writes is read in bounds."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limits = Limits(seconds=60)
    nested = "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)\n"
    assert run_program(nested, limits, sandbox) == "passed"
    full = (
        "import os\nfor name in ('errors', 'program.py'): os.symlink('/dev/full', name)\nassert 0"
    )
    assert run_program(full, limits, sandbox) == "AssertionError"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(best_sandbox().name is None, reason="this machine has no sandbox")
def test_the_sandbox(tmp_path, monkeypatch):
    """What only a sandbox covers: these programs go around Python's own refusals."""
    monkeypatch.setenv("SECRET", "a token")
    limits = Limits(seconds=60)
    outlived = tmp_path / "outlived"
    libc = "import ctypes, os, time\nlibc = ctypes.CDLL(None)\n"
    fork = f"if libc.fork() == 0: libc.setsid(); time.sleep(1); open({str(outlived)!r}, 'w')\n"
    outcome = run_program(libc + fork, limits)
    time.sleep(1.5)
    assert not outlived.exists(), outcome
    if sys.platform == "darwin":
        return
    peek = "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'): assert 'SECRET' not in "
    assert run_program(peek + "open(path, errors='replace').read()", limits) == "passed"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        address = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + b"\x7f\0\0\1"
        connect = (
            f"s = libc.socket(2, 1, 0)\nassert libc.connect(s, {address + bytes(8)!r}, 16) == 0"
        )
        assert run_program(libc + connect, limits) == "AssertionError"
        assert run_program(libc + connect, limits, SANDBOXES[-1]) == "passed"
