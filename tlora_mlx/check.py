"""``python -m tlora_mlx.check``: the data as the model will see it, before an hour is spent."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tlora_mlx.cli import run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.training_options import CheckCommand, TrainConfig

DESCRIPTION = "Look at training data as the model will see it; the weights are not needed."


def command(argv: Sequence[str] | None) -> None:
    """Show the first samples, a table of the splits, and warnings."""
    config = parse(CheckCommand, "tlora check", DESCRIPTION, argv, also_known=TrainConfig)

    from tlora_mlx.terminal import print_sample, print_splits, say
    from tlora_mlx.training.data_check import check

    result = check(config)
    for row, runs in result.shown:
        print_sample(row, runs)
    print_splits(result.summaries)
    for warning in result.warnings:
        say(f"warning: {warning}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
