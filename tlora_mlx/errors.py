"""The two ways a command fails, and how a failure becomes one sentence and an exit code."""

from __future__ import annotations

import io
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
    """Ctrl-C or SIGTERM; ``exit_code`` is 130 or 143."""

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


def run_command(command: Callable[[], None]) -> int:
    """Run a command; print its failure as one sentence on stderr and return the exit code.

    A failure that is none of ours and not the system's is a bug: its traceback is what a bug
    report needs, so it is let through.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # for terminals that have no × or emoji
        sys.stdout.reconfigure(errors="replace")
    try:
        with sigterm_as_ctrl_c():
            command()
        return 0
    except (UserError, RunError, Interrupted) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print("error: interrupted", file=sys.stderr)
        return interruption_code(stop)
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or first_line(error)}{where}", file=sys.stderr)
        return 1
