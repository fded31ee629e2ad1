"""A training run from its options to the finished adapter, new or resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.data.samples import Split
from tlora_mlx.distributed.collectives import from_first, is_first
from tlora_mlx.errors import (
    Interrupted,
    RunError,
    UserError,
    counted,
    first_line,
    interruption_code,
)
from tlora_mlx.invocation import suggested
from tlora_mlx.method.layers import attach
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.reporting.notebook import run_html
from tlora_mlx.reporting.pictures import can_draw, draw_losses
from tlora_mlx.runs.checkpoint import Checkpoint, checkpoint_from_first
from tlora_mlx.runs.metrics import read_lines
from tlora_mlx.runs.progress import Progress
from tlora_mlx.runs.rates import read_rates
from tlora_mlx.runs.run_directory import LOSSES, METRICS, RATES
from tlora_mlx.runs.writer import RunWriter
from tlora_mlx.storage.files import user_path
from tlora_mlx.training.best import BestAdapter
from tlora_mlx.training.loop import Training
from tlora_mlx.training.planning import plan_from_first
from tlora_mlx.training.prompts import answers, read_prompts, tokenize_prompts
from tlora_mlx.training.rate_search import search_rate
from tlora_mlx.training.setup import Setup, prepare
from tlora_mlx.training.start import check_start, find_start
from tlora_mlx.training.step import make_optimizer
from tlora_mlx.training.validation import evaluate


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    Attributes:
        directory: the run directory, with ``adapter_config.json``, ``rank_plan.json``,
            ``adapters.safetensors``, ``metrics.jsonl`` and ``checkpoints/``.
        progress: iterations, tokens, time and losses.
        test_loss: the loss after training; None if not requested, or not finite.
        was_finished: the run had already finished, so nothing was done.
    """

    directory: Path
    progress: Progress
    test_loss: float | None = None
    was_finished: bool = False

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``.

        Raises:
            UserError: one of them is damaged.
        """
        return read_lines(self.directory / METRICS)

    def _repr_html_(self) -> str:
        return run_html(self.directory, self.summary())

    def summary(self) -> list[str]:
        """Updates, time, tokens and losses, in a few lines."""
        progress, seconds = self.progress, round(self.progress.seconds)
        lines = [
            f"trained {counted(progress.iteration, 'iteration')} on "
            f"{counted(progress.trained_tokens, 'token')} in "
            f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            + (
                f", {counted(progress.skipped, 'update')} skipped as not finite"
                if progress.skipped
                else ""
            )
        ]
        if progress.best_loss is not None and progress.first_val_loss is not None:
            lines.append(
                f"validation loss {progress.first_val_loss:.4f} before, {progress.best_loss:.4f} "
                f"after iteration {progress.best_iteration} (the adapter that was kept)"
            )
        if progress.test_loss is not None or self.test_loss is not None:
            losses = (
                "nan" if x is None else f"{x:.4f}" for x in (progress.test_loss, self.test_loss)
            )
            lines.append("test loss {} before, {} after".format(*losses))
        return lines


def train(config: TrainConfig, observer: Observer = SILENT) -> TrainingResult:
    """Train an adapter as configured; under ``mlx.launch``, together with the other processes.

    Each of them has its share of every batch and the same weights; only the first one writes.

    Args:
        config: the options.
        observer: notified of the progress.

    Returns:
        The run directory, and the figures of the run.

    Raises:
        UserError: the configuration, the model or the data are invalid.
        RunError: it failed while running.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; everything was saved.
    """
    path = user_path(config.adapter_path)
    if config.resume and config.learning_rate == "auto":  # it was found when the run began
        found = read_rates(path / RATES) if is_first() else None
        config = replace(config, learning_rate=from_first(found.recommended if found else "auto"))
    if not is_first():
        return _train(config, path, None, observer)
    with RunWriter(path, config, observer) as writer:
        return _train(config, path, writer, observer)


def _train(
    config: TrainConfig, path: Path, writer: RunWriter | None, observer: Observer
) -> TrainingResult:
    """The run as one process sees it; ``writer`` is the first process's."""
    stored = writer.newest_checkpoint() if writer and config.resume else None
    checkpoint = checkpoint_from_first(stored)
    if checkpoint:
        progress = checkpoint.state.progress
        if from_first(writer and writer.is_finished(progress)):
            return TrainingResult(path, progress, was_finished=True)
    if is_first():
        check_start(config)
    prompts = read_prompts(config.sample_prompts)
    setup = prepare(config, observer)
    setup = replace(setup, prompts=tokenize_prompts(prompts, setup.base))
    if config.test and not setup.data["test"].samples:
        raise UserError("--test needs test data: test.jsonl, or a split 'test'; there is none")
    if config.early_stop and not setup.data["valid"].samples:
        raise UserError("--early-stop needs validation data: valid.jsonl, or --val-split")
    if checkpoint:
        training = _resume(config, setup, checkpoint, writer, observer)
    else:
        training = _begin(config, setup, writer, observer)
    again = suggested("train", "--adapter-path", path, "--resume")
    try:
        training.fit()
        training.best.restore(training.model)
        test_loss = _test_loss(training, setup.data["test"])
        training.finish()  # last: it marks the run as finished
    except Interrupted as interruption:
        training.finish()
        raise Interrupted(
            f"{interruption}; everything is saved, continue with: {again}", interruption.exit_code
        ) from None
    except RunError as error:
        raise RunError(f"{error}; to continue from the last checkpoint: {again}") from None
    except KeyboardInterrupt as stop:  # outside the training loop
        raise Interrupted(
            f"interrupted; continue from the last checkpoint: {again}", interruption_code(stop)
        ) from None
    if writer:
        _draw_losses(path, observer)
    return TrainingResult(path, training.progress, test_loss)


def _begin(
    config: TrainConfig, setup: Setup, writer: RunWriter | None, observer: Observer
) -> Training:
    """A new run: find or load the plan and A, and create the directory."""
    base, fingerprints = setup.base, setup.fingerprints()
    if writer:
        writer.report_to_others()
        writer.create()
    start = find_start(config, setup, observer)
    mx.reset_peak_memory()  # reports say what training takes
    attach(base.model, start.plan, start.a)
    search = None
    if config.learning_rate == "auto":
        search = search_rate(base.model, setup.data, config, observer)
        observer.note(f"learning rate {search.recommended:.2g}, the best of {len(search.trials)}")
        config = replace(config, learning_rate=search.recommended)
        if writer:
            writer.config = config
    training = Training(
        base.model,
        make_optimizer(config, base.model),
        setup.data["train"],
        setup.data["valid"],
        config,
        samples=_samples(setup),
        recorder=writer,
        observer=observer,
    )
    training.progress.test_loss = _test_loss(training, setup.data["test"])
    if writer:
        writer.start(base, start, fingerprints, search)
    training.save()
    return training


def _resume(
    config: TrainConfig,
    setup: Setup,
    checkpoint: Checkpoint,
    writer: RunWriter | None,
    observer: Observer,
) -> Training:
    """A run in the state of its checkpoint."""
    state, fingerprints = checkpoint.state, setup.fingerprints()
    plan = plan_from_first(writer.rewind(checkpoint, fingerprints) if writer else None)
    observer.note(f"continuing after iteration {state.progress.iteration}")
    if writer:
        writer.report_to_others()
    model = setup.base.model
    attach(model, plan, state.adapters)
    return Training(
        model,
        make_optimizer(config, model, state.optimizer),
        setup.data["train"],
        setup.data["valid"],
        config,
        progress=state.progress,
        best=BestAdapter(state.best),
        samples=_samples(setup),
        recorder=writer,
        observer=observer,
    )


def _samples(setup: Setup) -> Callable[[], list[dict[str, str]]] | None:
    """What answers the prompts of ``--sample-prompts``, in the process that records."""
    if not setup.prompts or not is_first():
        return None
    return partial(answers, setup.base.model, setup.base.tokenizer, setup.prompts)


def _test_loss(training: Training, split: Split) -> float | None:
    """Compute and report the loss on the test split; None if not requested, or not finite."""
    if not training.config.test:
        return None
    iteration = training.progress.iteration
    loss = evaluate(
        training.model, split, training.config, "testing", -1, observer=training.observer
    )
    if not math.isfinite(loss):
        training.observer.note(f"the test loss of iteration {iteration} is not finite")
        loss = None
    training.recorder.report({"iteration": iteration, "test_loss": loss})
    return loss


def _draw_losses(path: Path, observer: Observer) -> None:
    """Draw the losses as ``loss.png``, if matplotlib is installed and the reports are intact."""
    try:
        if can_draw():
            draw_losses(read_lines(path / METRICS), path / LOSSES)
    except (RunError, UserError, ValueError) as error:
        observer.note(f"{LOSSES} was not drawn: {first_line(error)}")
