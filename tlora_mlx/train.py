"""``python -m tlora_mlx.train``: calibrate, allocate, initialise and train, in one screen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tlora_mlx.config import TrainConfig, parse
from tlora_mlx.errors import Interrupted, UserError, run_command

DESCRIPTION = "Fine-tune a language model with TLoRA (task-aware LoRA: A frozen, B trained)."


def train(config: TrainConfig) -> Path:
    """Train an adapter as configured.

    Returns:
        The run directory, which holds ``adapter_config.json``, ``rank_plan.json``,
        ``adapters.safetensors``, ``metrics.jsonl`` and ``checkpoints/``.

    Raises:
        UserError: the configuration, the model or the data are not right.
        RunError: it failed while running.
        Interrupted: SIGINT or SIGTERM came; the adapter was saved.
    """
    import mlx.core as mx

    from tlora_mlx import pipeline
    from tlora_mlx.method.layers import attach
    from tlora_mlx.run_directory import RunWriter
    from tlora_mlx.training.loop import evaluate, fit
    from tlora_mlx.training.progress import say

    if mx.distributed.init().size() > 1:
        raise UserError("training takes one process for now; mlx.launch works with tlora plan")
    run = RunWriter(Path(config.adapter_path).expanduser())
    base, data, targets = pipeline.load(config)
    if config.test and not data["test"].samples:
        raise UserError(f"--test needs samples in {config.data}/test.jsonl, and there are none")
    run.create()

    plan, tensors = pipeline.plan_and_initialise(config, base, data["train"], targets)
    config = replace(config, rank=plan.rank, alpha=plan.alpha)
    run.start(config, base, plan)
    attach(base.model, plan, tensors)

    def test_loss() -> float | None:
        return evaluate(base.model, data["test"], config, "testing", -1) if config.test else None

    before = test_loss()
    try:
        fit(
            base.model,
            data["train"],
            data["valid"],
            config,
            report=run.report,
            save=lambda iteration: run.checkpoint(base.model, iteration),
        )
    except Interrupted as interruption:
        run.finish(base.model)
        raise Interrupted(
            f"{interruption}; the adapter as it is is saved in {run.path}", interruption.exit_code
        ) from None
    run.finish(base.model)
    if config.test:
        say(f"test loss {before:.4f} before, {test_loss():.4f} after")
    say(f"adapter saved in {run.path}; next: python -m tlora_mlx.export {run.path} --format peft")
    return run.path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: train(parse(TrainConfig, "tlora train", DESCRIPTION, argv)))


if __name__ == "__main__":
    sys.exit(main())
