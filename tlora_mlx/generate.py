"""``python -m tlora_mlx.generate``: a completion by the base model and one with the adapter."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tlora_mlx.cli import announce, run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.usage_options import GenerateCommand
from tlora_mlx.errors import visible

DESCRIPTION = "Complete a prompt with a run's base model and with its adapter, without sampling."


def command(argv: Sequence[str] | None) -> None:
    """Print both completions as they are generated."""
    config = parse(GenerateCommand, "tlora generate", DESCRIPTION, argv)
    announce(f"loading {config.run} and its base model …")

    from tlora_mlx.evaluation.completion import completions

    for title, parts in completions(config, sys.stdin):
        print(f"--- {title}")
        for part in parts:
            print(visible(part, "\n\t"), end="", flush=True)
        print()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
