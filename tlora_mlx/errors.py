"""The ways in which a command fails, and how other people's texts become one harmless line."""

from __future__ import annotations

import reprlib
import signal
import unicodedata
from typing import Any

# The categories of controls, lone surrogates, and separators of lines and paragraphs.
OBEYED = ("Cc", "Cs", "Zl", "Zp")
# Characters that reverse or isolate the text around them (Unicode standard annex 9).
BIDIRECTIONAL = set("\u200e\u200f\u061c") | {
    chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


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


def last_line(code: int, message: str) -> str:
    """What a command that failed prints last: no error if the user or the system stopped it."""
    return message if code >= 128 else f"error: {message}"


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 row", "2 rows", "1,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def visible(text: str, keep: str = "") -> str:
    """A text as a terminal may have it: what it would obey, not show, is written as an escape.

    Names in adapters, paths and YAML are other people's: with ESC they could move the cursor or
    change the window, with a line break they could forge a message.

    Args:
        text: any text, lone surrogates included.
        keep: control characters that are meant, such as the line breaks of a model's answer.
    """
    if text.isprintable():
        return text

    def shown(character: str) -> str:
        is_obeyed = character in BIDIRECTIONAL or unicodedata.category(character) in OBEYED
        return ascii(character)[1:-1] if is_obeyed and character not in keep else character

    return "".join(map(shown, text))


def shown(value: Any) -> str:
    """Somebody's value in a message, cut short: YAML's aliases make values of any size."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlevel = 2
    try:
        text = short.repr(value)
        return text if len(text) <= 300 else f"{text[:300]} …"
    except ValueError:  # more digits than Python writes
        return "a huge number"
