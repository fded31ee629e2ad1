"""``python -m tlora_mlx.chat``: a chat with a run, next to its base model."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import closing

from tlora_mlx.cli import run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.usage_options import ChatCommand
from tlora_mlx.errors import Terminated, UserError, visible

COMMANDS = (
    "/base asks the base model the same, /new starts over, Ctrl-C stops an answer, Ctrl-D ends."
)
DESCRIPTION = f"Chat with a run; {COMMANDS}"


def command(argv: Sequence[str] | None) -> None:
    """Answer message by message, as it is generated."""
    config = parse(ChatCommand, "tlora chat", DESCRIPTION, argv)

    from tlora_mlx.evaluation.conversing import ChatSession
    from tlora_mlx.terminal import messages

    session = ChatSession(config)
    print(f"Chat with the run; {COMMANDS}")
    for message in messages():
        if message == "/new":
            session.restart()
            continue
        if message != "/base" and re.fullmatch(r"/\w*", message):
            print(f"there is no command {message}; {COMMANDS}")
            continue
        answer = session.base_answer() if message == "/base" else session.answer(message)
        try:
            with closing(answer):
                for part in answer:
                    print(visible(part, "\n\t"), end="", flush=True)
            print()
        except UserError as error:
            print(visible(str(error)))
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated) or not sys.stdin.isatty():
                raise
            print()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
