"""``python -m tlora_mlx.plan``: calibrate and allocate only, to look before training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tlora_mlx.config import PlanCommand, TrainConfig, parse
from tlora_mlx.errors import UserError, run_command

if TYPE_CHECKING:
    from tlora_mlx.method.allocation import RankPlan

DESCRIPTION = "Calibrate a model on task samples and show how TLoRA would spread its ranks."


def plan(config: PlanCommand) -> RankPlan:
    """Calibrate and allocate as configured, write the plan as JSON and, with matplotlib, a picture.

    Raises:
        UserError: the configuration, the model or the data are not right.
        RunError: it failed while running.
    """
    from tlora_mlx import pipeline
    from tlora_mlx.files import user_path, write_json
    from tlora_mlx.method.distributed import is_first
    from tlora_mlx.pictures import can_draw, draw_plan
    from tlora_mlx.training.progress import print_plan, say

    output = user_path(config.output)
    fits = output.parent.is_dir() and (output.is_file() or not output.exists())
    if is_first() and not fits:
        raise UserError(f"--output {output} must be a file in a directory that exists")
    if output.suffix == ".png":
        raise UserError(f"--output {output} is the plan's JSON; the picture goes beside it as .png")
    if config.sensitivities:
        result = replan(pipeline.read_plan(config.sensitivities), config)
    else:
        base, data, targets = pipeline.load(config)
        batches = pipeline.calibration_batches(config, data["train"])
        _, result = pipeline.calibrate_and_plan(config, base, targets, batches)
    print_plan(result)
    if not is_first():
        return result
    write_json(output, result.to_dict())
    written = [str(output)]
    if can_draw():
        written.append(str(draw_plan(result, output.with_suffix(".png"))))
    say(f"plan written to {' and '.join(written)}")
    return result


def replan(earlier: RankPlan, config: PlanCommand) -> RankPlan:
    """Allocate anew, by another rank, alpha or cap, from an earlier plan's sensitivities.

    Raises:
        UserError: the sensitivities are of no use.
    """
    from tlora_mlx.method.allocation import plan_ranks

    sensitivities = {name: module.sensitivity for name, module in earlier.modules.items()}
    shapes = {name: (m.out_features, m.in_features) for name, m in earlier.modules.items()}
    try:
        return plan_ranks(sensitivities, shapes, config.rank, config.alpha, config.max_rank)
    except ValueError as error:
        raise UserError(f"the rank plan {config.sensitivities} is not right: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(
        lambda: plan(parse(PlanCommand, "tlora plan", DESCRIPTION, argv, also_known=TrainConfig))
    )


if __name__ == "__main__":
    sys.exit(main())
