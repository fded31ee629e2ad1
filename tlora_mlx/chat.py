"""``python -m tlora_mlx.chat``: a chat with a run, next to its base model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from tlora_mlx.cli import run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.usage_options import ChatCommand
from tlora_mlx.errors import UserError, visible

DESCRIPTION = (
    "Chat with a run. /base asks its base model the same, /new starts over, Ctrl-D ends the chat."
)


def command(argv: Sequence[str] | None) -> None:
    """Answer line by line, as it is generated."""
    config = parse(ChatCommand, "tlora chat", DESCRIPTION, argv)

    from tlora_mlx.evaluation.conversing import ChatSession

    session = ChatSession(config)
    print("Chat with the run; /base asks its base model the same, /new starts over, Ctrl-D ends.")
    for line in _lines():
        if line == "/new":
            session.restart()
            continue
        try:
            for part in session.base_answer() if line == "/base" else session.answer(line):
                print(visible(part, "\n\t"), end="", flush=True)
            print()
        except UserError as error:
            print(visible(str(error)))


def _lines() -> Iterator[str]:
    """The lines of standard input that are not empty."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8 text") from None
        if line:
            yield line


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
