"""The two ways a command fails, and how a failure becomes one sentence and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input. The message is one sentence that says what is wrong, where, and what to do."""

    exit_code = 2


class RunError(Exception):
    """A failure while running (disk full, loss not a number): nothing half-written is left."""

    exit_code = 1


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP; ``exit_code`` is 130, 143 or 129."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(KeyboardInterrupt):
    """SIGTERM where nothing waits for it: as Ctrl-C, so that what is half-written is removed."""


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise ``Terminated`` inside of the block."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def interruption_code(stop: KeyboardInterrupt) -> int:
    """The exit code: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def first_line(error: BaseException) -> str:
    """What another library says of its failure, cut to its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_command(command: Callable[[], object]) -> int:
    """Run a command; print its failure as one sentence on stderr and return the exit code.

    A failure that is none of ours and not the system's is a bug: its traceback is what a bug
    report needs, so it is let through. Under ``mlx.launch`` a failure in one process ends all.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # for terminals that have no × or emoji
        sys.stdout.reconfigure(errors="replace")
    if not _launched():
        code, message = _outcome(command)
    else:
        from tlora_mlx.watch import start

        watch = start()
        code, message = _outcome(command)
        if watch:
            return watch.leave(code, message)
    if message:
        print(f"error: {message}", file=sys.stderr)
    return code


def _launched() -> bool:
    """Whether ``mlx.launch`` started this process, with one of its backends (or Open MPI did)."""
    return "MLX_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ


def _outcome(command: Callable[[], object]) -> tuple[int, str]:
    """The exit code and, where it failed, why."""
    try:
        with sigterm_as_ctrl_c():
            command()
        return 0, ""
    except (UserError, RunError, Interrupted) as error:
        return error.exit_code, str(error)
    except SystemExit as stop:  # --help, --version
        return int(stop.code or 0), ""
    except KeyboardInterrupt as stop:
        return interruption_code(stop), "interrupted"
    except BrokenPipeError:
        return 1, ""
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return 1, f"{error.strerror or first_line(error)}{where}"
