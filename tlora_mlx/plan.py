"""``python -m tlora_mlx.plan``: only calibrate and allocate, for a look before training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tlora_mlx.cli import announce, run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.training_options import PlanCommand, TrainConfig

DESCRIPTION = "Calibrate a model on your data and show where TLoRA would put the ranks."


def command(argv: Sequence[str] | None) -> None:
    """Make the plan, show it, and write it with its picture."""
    config = parse(PlanCommand, "tlora plan", DESCRIPTION, argv, TrainConfig, note=announce)
    if not config.sensitivities:
        announce(f"loading model {config.model} …")

    from tlora_mlx.terminal import Terminal, print_plan, say
    from tlora_mlx.training.planning import plan, plan_output, write_plan

    output = plan_output(config)
    result = plan(config, Terminal())
    print_plan(result)
    if written := write_plan(result, output):
        say(f"plan written to {' and '.join(map(str, written))}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
