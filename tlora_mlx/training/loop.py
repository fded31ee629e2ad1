"""The training loop: only B is trained, and the loss is the mean over the counted tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import count, islice

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.data.batches import epoch_order
from tlora_mlx.data.samples import Sample, Split
from tlora_mlx.errors import Interrupted, RunError
from tlora_mlx.method.layers import adapter_tensors
from tlora_mlx.method.output_layer import is_separable
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.runs.checkpoint import TrainingState
from tlora_mlx.runs.progress import Progress, Window
from tlora_mlx.runs.recorder import Recorder
from tlora_mlx.training.best import BestAdapter
from tlora_mlx.training.schedule import learning_rate
from tlora_mlx.training.signals import agreed, stop_requests
from tlora_mlx.training.step import Step
from tlora_mlx.training.validation import evaluate


def batches_per_epoch(samples: int, config: TrainConfig) -> int:
    """The number of micro-batches in an epoch, including a partial last one."""
    return -(-samples // config.batch_size)


def total_updates(samples: int, config: TrainConfig) -> int:
    """The number of optimizer updates in a run: ``iters``, or those of ``epochs`` epochs."""
    if config.epochs is None:
        return config.iters
    batches = config.epochs * batches_per_epoch(samples, config)
    return -(-batches // config.grad_accumulation_steps)


def training_batches(
    samples: list[Sample], config: TrainConfig, start: int
) -> Iterator[list[Sample]]:
    """The micro-batches from number ``start`` on; endless, unless ``epochs`` is given."""
    lengths = [len(sample.tokens) for sample in samples]
    first, skip = divmod(start, batches_per_epoch(len(samples), config))
    for epoch in range(first, config.epochs) if config.epochs else count(first):
        order = epoch_order(lengths, config.batch_size, config.seed, epoch)
        for numbers in order[skip:]:
            yield [samples[i] for i in numbers]
        skip = 0


class Training:
    """The state of a training run: what the loop reads, and what it updates.

    Everything depends only on the arguments, so a run that is resumed from a checkpoint ends with
    the same bits as an uninterrupted one (on the CPU).

    Args:
        model: with ``TLoRALinear`` layers attached.
        optimizer: from ``make_optimizer``, with its state as of ``progress``.
        train: samples to learn from.
        valid: samples to validate on; may be empty.
        config: the run's options.
        progress: where the run stands; updated in place.
        best: the adapter with the lowest validation loss so far; updated in place.
        samples: called at each validation: prompts, each with the model's answer.
        recorder: receives each report: ``iteration`` and either ``train_loss``, ``learning_rate``,
            ``grad_norm`` (of the last update, before clipping), ``iterations_per_second``,
            ``tokens_per_second``, ``trained_tokens`` and ``peak_memory`` (GB), or ``val_loss`` and
            ``val_time`` (s); and the state, every ``save_every`` updates and at the end.
        observer: notified of the same reports, and of each update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        train: Split,
        valid: Split,
        config: TrainConfig,
        *,
        progress: Progress | None = None,
        best: BestAdapter | None = None,
        samples: Callable[[], list[dict[str, str]]] | None = None,
        recorder: Recorder | None = None,
        observer: Observer = SILENT,
    ):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.train, self.valid = train, valid
        self.progress, self.best = progress or Progress(), best or BestAdapter()
        self.samples = samples
        self.recorder, self.observer = recorder or Recorder(), observer
        self.updates = total_updates(len(train), config)

    def save(self) -> None:
        """Have the recorder save everything that the rest of the run depends on."""
        self.recorder.checkpoint(
            TrainingState(
                adapter_tensors(self.model),
                dict(tree_flatten(self.optimizer.state)),
                self.best.b,
                self.progress,
            )
        )

    def finish(self) -> None:
        """Give the model the adapter to keep, and have the recorder save it."""
        self.best.restore(self.model)
        self.recorder.finish(adapter_tensors(self.model), self.progress.kept_iteration)

    def fit(self) -> None:
        """Train the model's trainable parameters in place, from where the run stands to the end.

        Raises:
            RunError: a loss or gradient is not finite; the weights are those after the last good
                update.
            Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the weights are those after the last
                update.
        """
        progress, config = self.progress, self.config
        self.model.eval()
        separable = is_separable(self.model, mx.array([self.train.samples[0].tokens]))
        self.model.train()
        step = Step(self.model, self.optimizer, config, separable)
        batches = training_batches(self.train.samples, config, progress.batches)
        stage = self.observer.stage("training", self.updates, progress.iteration)
        with stage as advance, stop_requests() as stops:
            while not progress.finished:
                self._validate_or_stop(stops)
                if progress.iteration == self.updates or self._is_stale():
                    progress.finished = True
                    self.save()
                    break
                start = time.perf_counter()
                rate = learning_rate(
                    progress.iteration,
                    self.updates,
                    config.learning_rate,
                    config.lr_schedule,
                    config.warmup,
                )
                samples = list(islice(batches, config.grad_accumulation_steps))
                loss, tokens, norm = step(samples, rate, progress.batches)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    self._skip_or_fail(loss, samples)
                    loss = tokens = 0
                progress.iteration += 1
                progress.batches += len(samples)
                progress.count(loss, tokens, time.perf_counter() - start)
                if progress.window.tokens:
                    advance(1, _stage_text(progress.window))
                last = progress.iteration == self.updates
                if progress.iteration % config.steps_per_report == 0 or last:
                    self._report(rate, norm)
                if progress.iteration % config.save_every == 0 and not last:
                    self.save()

    def _validate_or_stop(self, stops: list[int]) -> None:
        """Validate if it is due; if a signal arrived, save everything and stop."""
        now = self.progress.iteration
        due = now % self.config.steps_per_eval == 0 or now == self.updates
        try:
            if self.valid.samples and due and self.progress.validated != now:
                self._validate(stops)
            if stop := agreed(stops):
                raise Interrupted("", 128 + stop)
        except Interrupted as interruption:
            self.save()
            raise Interrupted(
                f"interrupted after iteration {now} of {self.updates}", interruption.exit_code
            ) from None

    def _is_stale(self) -> bool:
        """Whether validation has not improved for as long as ``early_stop`` allows."""
        stale = self.progress.stale
        if not 0 < (self.config.early_stop or 0) <= stale:
            return False
        self.observer.note(
            f"stopped early: {stale} consecutive validations without improvement on "
            f"{self.progress.best_loss:.4f}"
        )
        return True

    def _skip_or_fail(self, loss: float, batches: list[list[Sample]]) -> None:
        """Skip an update that is not finite, or end the run if no more may be skipped."""
        progress, allowed = self.progress, self.config.skip_nonfinite
        what = _not_finite(progress.iteration + 1, loss, batches, self.train)
        if progress.skipped == allowed:
            self.save()
            raise RunError(
                f"{what}; the weights of iteration {progress.iteration} are unchanged and "
                "saved: look at these samples, try a lower --learning-rate, or skip such "
                f"updates with --skip-nonfinite {progress.skipped + 1}"
            )
        progress.skipped += 1
        self.observer.note(f"{what}; skipped ({progress.skipped} of {allowed})")

    def _validate(self, stops: list[int]) -> None:
        """Validate, and keep the adapter if its loss is the lowest so far."""
        progress, config = self.progress, self.config
        start = time.perf_counter()
        loss = evaluate(
            self.model, self.valid, config, "validating", config.val_batches, stops, self.observer
        )
        samples = self.samples() if self.samples else None
        self.model.train()
        now = progress.validated = progress.iteration
        known = loss if math.isfinite(loss) else None
        if now == 0:
            progress.first_val_loss = known
        lowest = known is not None and (progress.best_loss is None or known < progress.best_loss)
        # Before the first update B is 0, so there is nothing to keep, unless an adapter was given.
        if lowest and (now > 0 or config.from_adapter):
            progress.best_loss, progress.best_iteration, progress.stale = known, now, 0
            self.best.keep(self.model)
        elif now > 0:
            progress.stale += 1
        seconds = time.perf_counter() - start
        self._send_report({"iteration": now, "val_loss": known, "val_time": seconds})
        if samples:
            self.recorder.report({"iteration": now, "samples": samples})

    def _report(self, rate: float, norm: float) -> None:
        """Report the window's figures, and empty it."""
        progress, window = self.progress, self.progress.window
        progress.window = Window()
        self._send_report(
            {
                "iteration": progress.iteration,
                "train_loss": window.loss / window.tokens if window.tokens else None,
                "learning_rate": rate,
                "grad_norm": norm if math.isfinite(norm) else None,
                "iterations_per_second": window.updates / window.seconds,
                "tokens_per_second": window.tokens / window.seconds,
                "trained_tokens": progress.trained_tokens,
                "peak_memory": mx.get_peak_memory() / 1e9,
            }
        )

    def _send_report(self, metrics: dict[str, float | None]) -> None:
        self.observer.reported(metrics)
        self.recorder.report(metrics)


def _not_finite(iteration: int, loss: float, batches: list[list[Sample]], train: Split) -> str:
    """A message that says what was not finite, and in which samples."""
    what = "gradient" if math.isfinite(loss) else "loss"
    samples = [sample for batch in batches for sample in batch]
    shown = train.place(samples[:20]) + (", …" if len(samples) > 20 else "")
    return f"the {what} is not finite in iteration {iteration} ({shown})"


def _stage_text(window: Window) -> str:
    return (
        f"loss {window.loss / window.tokens:.3f}, {window.tokens / window.seconds:.0f} tokens/s, "
        f"{mx.get_peak_memory() / 1e9:.2f} GB"
    )
