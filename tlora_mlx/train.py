"""``python -m tlora_mlx.train``: calibrate, allocate, initialise and train, in one screen."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tlora_mlx.config import TrainConfig, parse
from tlora_mlx.errors import (
    Interrupted,
    RunError,
    UserError,
    interruption_code,
    run_command,
)

if TYPE_CHECKING:
    from tlora_mlx.run_writer import RunWriter

DESCRIPTION = "Fine-tune a language model with TLoRA (task-aware LoRA: A frozen, B trained)."


def train(config: TrainConfig) -> Path:
    """Train an adapter as configured; under ``mlx.launch``, together with the other processes.

    Each of them has its share of every batch and the same weights; the first one alone writes.

    Returns:
        The run directory, which holds ``adapter_config.json``, ``rank_plan.json``,
        ``adapters.safetensors``, ``metrics.jsonl`` and ``checkpoints/``.

    Raises:
        UserError: the configuration, the model or the data are not right.
        RunError: it failed while running.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; everything was saved.
    """
    from tlora_mlx.files import user_path
    from tlora_mlx.follower import Follower
    from tlora_mlx.method.distributed import is_first
    from tlora_mlx.run_writer import RunWriter

    writer = RunWriter if is_first() else Follower
    with writer(user_path(config.adapter_path), config) as run:
        _train(config, run)
    return run.path


def _train(config: TrainConfig, run: RunWriter) -> None:
    from tlora_mlx import pipeline
    from tlora_mlx.method.allocation import RankPlan
    from tlora_mlx.method.distributed import from_first
    from tlora_mlx.method.layers import attach
    from tlora_mlx.terminal import say
    from tlora_mlx.training.checkpoint import Progress, checkpoint_from_first
    from tlora_mlx.training.loop import evaluate, fit, make_optimizer
    from tlora_mlx.training.progress import say_summary

    checkpoint = checkpoint_from_first(run.newest_checkpoint() if config.resume else None)
    if checkpoint and from_first(run.is_finished(checkpoint.progress)):
        say(f"the run in {run.path} is finished; next: {_export(run.path)}")
        return
    base, data, targets = pipeline.load(config)
    if config.test and not data["test"].samples:
        raise UserError(f"--test needs samples in {config.data}/test.jsonl, and there are none")
    if config.early_stop and not data["valid"].samples:
        raise UserError("--early-stop needs validation data: valid.jsonl, or --val-split")
    fingerprints = pipeline.fingerprints(base, data)

    if checkpoint:
        plan = run.go_on(checkpoint, fingerprints)
        plan = RankPlan.from_dict(from_first(plan and plan.to_dict()))
        progress = checkpoint.progress
        tensors, optimizer_state = checkpoint.adapters, checkpoint.optimizer
        say(f"going on after iteration {progress.iteration}")
        run.report_to_others()
    else:
        given = pipeline.from_adapter(config.from_adapter, base) if config.from_adapter else None
        run.report_to_others()
        run.create()
        energies: dict[str, float] = {}
        plan, tensors = given or pipeline.plan_and_initialise(
            config, base, data["train"], targets, energies
        )
        progress, optimizer_state = Progress(), None
    attach(base.model, plan, tensors)
    optimizer = make_optimizer(config, base.model, optimizer_state)

    def test_loss() -> float | None:
        if not config.test:
            return None
        loss = evaluate(base.model, data["test"], config, "testing", -1)
        if not math.isfinite(loss):
            say(f"the test loss of iteration {progress.iteration} is not finite")
            loss = None
        run.report({"iteration": progress.iteration, "test_loss": loss})
        return loss

    if not checkpoint:
        progress.test_loss = test_loss()
        run.start(base, plan, fingerprints, energies)
        run.checkpoint(base.model, optimizer, progress)
    again = f"python -m tlora_mlx.train --adapter-path {run.path} --resume"
    try:
        fit(base.model, optimizer, data["train"], data["valid"], config, progress, run)
        run.give_best(base.model)
        tested = test_loss()
        run.finish(base.model, progress)  # last: it says that the run is finished
    except Interrupted as interruption:
        run.finish(base.model, progress)
        raise Interrupted(
            f"{interruption}; all is saved, go on with: {again}", interruption.exit_code
        ) from None
    except RunError as error:
        raise RunError(f"{error}; to go on from the last checkpoint: {again}") from None
    except KeyboardInterrupt as stop:  # where no step waits for it to be finished
        raise Interrupted(
            f"interrupted; go on from the last checkpoint: {again}", interruption_code(stop)
        ) from None
    say_summary(progress, tested)
    run.draw()
    say(f"adapter saved in {run.path}; next: {_export(run.path)}")


def _export(path: Path) -> str:
    return f"python -m tlora_mlx.export {path} --format peft"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: train(parse(TrainConfig, "tlora train", DESCRIPTION, argv)))


if __name__ == "__main__":
    sys.exit(main())
