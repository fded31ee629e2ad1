"""``python -m tlora_mlx.check``: the data as the model will see it, before an hour is spent."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tlora_mlx.cli import announce, run_command
from tlora_mlx.config.check_options import CheckCommand
from tlora_mlx.config.parsing import parse

DESCRIPTION = (
    "Look at your data as the model will see it. Only its tokenizer is loaded, unless --fit or "
    "--find-rate asks for more."
)


def command(argv: Sequence[str] | None) -> None:
    """Show the first samples, a table of the splits, and warnings."""
    config = parse(CheckCommand, "tlora check", DESCRIPTION, argv, note=announce)
    announce("loading the tokenizer …")

    from tlora_mlx.terminal import print_sample, print_splits, say
    from tlora_mlx.training.data_check import check

    result = check(config)
    for row, runs in result.shown:
        print_sample(row, runs)
    print_splits(result.summaries)
    for warning in result.warnings:
        say(f"warning: {warning}")
    if config.fit or config.find_rate:
        try_out(config)


def try_out(config: CheckCommand) -> None:
    """Load the model too, and print memory and time, and what learning rates lead to."""
    from tlora_mlx.terminal import Terminal, say
    from tlora_mlx.training.fit import measure_fit
    from tlora_mlx.training.rate_search import find_rate
    from tlora_mlx.training.setup import prepare

    terminal = Terminal()
    setup = prepare(config)
    if config.fit:
        for line in measure_fit(config, setup, observer=terminal).summary():
            say(line)
    if config.find_rate:
        for line in find_rate(config, setup, terminal).summary():
            say(line)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
