"""``python -m tlora_mlx.evaluate``: compare base model and adapter on a task."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tlora_mlx.cli import announce, run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.usage_options import EvaluateCommand

DESCRIPTION = "Compare a run's base model and its adapter on a task."


def command(argv: Sequence[str] | None) -> None:
    """Evaluate, and print the metrics."""
    config = parse(EvaluateCommand, "tlora evaluate", DESCRIPTION, argv)
    announce(f"loading {config.run} and its base model …")

    from tlora_mlx.evaluation.evaluate import evaluate
    from tlora_mlx.reporting.tables import metrics_table
    from tlora_mlx.terminal import Terminal, console, say

    result = evaluate(config, Terminal())
    console.print(metrics_table(result))
    say(f"results in {result.directory}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
