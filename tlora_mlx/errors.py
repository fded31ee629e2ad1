"""The ways in which a command fails, and how another library's error becomes one line."""

from __future__ import annotations

import signal


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
    """SIGTERM outside the training loop, handled like Ctrl-C: half-written files are removed."""


def interruption_code(stop: KeyboardInterrupt) -> int:
    """The exit code: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
