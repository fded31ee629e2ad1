"""``tlora completion SHELL``: the script that completes commands, options and paths with Tab."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tlora_mlx.cli import COMMANDS, run_command
from tlora_mlx.config.arguments import make_parser
from tlora_mlx.config.commands import OPTIONS_OF, PATHS
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.usage_options import CompletionCommand
from tlora_mlx.errors import UserError

DESCRIPTION = "Print a script that completes commands, options and paths with Tab."


def script(shell: str) -> str:
    """The script for a shell.

    Raises:
        UserError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs the package 'shtab': pip install shtab") from None
    parser = argparse.ArgumentParser("tlora", add_help=False)
    commands = parser.add_subparsers()
    for name, text in COMMANDS.items():
        options = make_parser(OPTIONS_OF[name], f"tlora {name}", text, show_all=True)
        for action in options._actions:
            if action.dest in PATHS and action.nargs != 0:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        commands.add_parser(name, parents=[options], add_help=False, help=text)
    return shtab.complete(parser, shell)


def command(argv: Sequence[str] | None) -> None:
    """Print it."""
    print(script(parse(CompletionCommand, "tlora completion", DESCRIPTION, argv).shell))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
