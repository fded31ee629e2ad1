"""Finding a learning rate: short runs from one start, each at another rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import mlx.nn as nn

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.data.samples import Split, split_off
from tlora_mlx.errors import Interrupted, RunError, counted
from tlora_mlx.method.layers import adapter_tensors, attach, detach, restore_b
from tlora_mlx.observer import SILENT, Advance, Observer
from tlora_mlx.runs.rates import RateSearch, Trial
from tlora_mlx.training.loop import Training, total_updates
from tlora_mlx.training.setup import Setup
from tlora_mlx.training.start import find_start
from tlora_mlx.training.step import make_optimizer
from tlora_mlx.training.validation import evaluate

# A few dozen updates tell rates apart; a run that is shorter is tried in full.
UPDATES = 24
# The rate that is tried first; then a factor of 2 up or down, until the loss rises on both sides.
FIRST_RATE, FACTOR = 1e-3, 2.0
LOWEST_RATE, HIGHEST_RATE = 1e-6, 1.0
# The share of the training samples that trials are validated on, if there is no validation data.
VALIDATION_SHARE = 0.1


@dataclass
class _TrialObserver(Observer):
    """Shows a trial's updates under its rate, and none of its reports."""

    outer: Observer
    name: str

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        return self.outer.stage(self.name, total, done)


def find_rate(config: TrainConfig, setup: Setup, observer: Observer = SILENT) -> RateSearch:
    """``search_rate`` from the start that the options describe; the model is the base afterwards.

    Raises:
        UserError: the given plan or adapter does not fit, or a module cannot be calibrated.
        RunError: a statistic is not finite, or no rate lowers the loss.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    start = find_start(config, setup, observer)
    attach(setup.base.model, start.plan, start.a)
    try:
        return search_rate(setup.base.model, setup.data, config, observer)
    finally:
        detach(setup.base.model)


def search_rate(
    model: nn.Module,
    data: dict[str, Split],
    config: TrainConfig,
    observer: Observer = SILENT,
) -> RateSearch:
    """Try learning rates in steps of 2 until the validation loss rises on both sides of the best.

    Each trial starts from the adapter as it is, takes the first batches of the run in its order,
    with its warm-up and schedule over a few dozen updates, and is validated as the run is.

    Args:
        model: with an adapter attached, which is the same afterwards.
        data: the splits; without validation data, a tenth of the training samples is set aside.
        config: the run's options; ``learning_rate`` is not used.
        observer: notified of each trial.

    Raises:
        RunError: no rate lowers the loss, or it is not finite before training.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    train, valid = data["train"], data["valid"]
    if not valid.samples:
        train, valid = split_off(train, VALIDATION_SHARE, config.seed)
    updates = min(UPDATES, total_updates(len(train), config))
    short = replace(config, iters=updates, epochs=None, skip_nonfinite=0, early_stop=None)
    begin = adapter_tensors(model)

    def validation_loss() -> float:
        return evaluate(model, valid, config, "validating", config.val_batches, observer=observer)

    def trial(rate: float) -> Trial:
        restore_b(model, begin)
        try:
            Training(
                model,
                make_optimizer(config, model),
                train,
                Split(),
                replace(short, learning_rate=rate),
                observer=_TrialObserver(observer, f"trying learning rate {rate:.2g}"),
            ).fit()
            loss = validation_loss()
        except RunError:  # not finite
            loss = math.nan
        except Interrupted as interruption:
            message = "interrupted while trying learning rates; nothing was trained"
            raise Interrupted(message, interruption.exit_code) from None
        known = math.isfinite(loss)
        observer.note(
            f"learning rate {rate:.2g}: validation loss {loss:.4f}"
            if known
            else f"learning rate {rate:.2g}: training does not stay finite"
        )
        return Trial(rate, loss if known else None)

    before = validation_loss()
    if not math.isfinite(before):
        raise RunError("the validation loss is not finite before training; look at the data")
    try:
        trials = sorted(_climb(trial), key=lambda t: t.rate)
    finally:
        restore_b(model, begin)
    if not any(t.loss is not None and t.loss < before for t in trials):
        raise RunError(
            f"no learning rate from {trials[0].rate:.2g} to {trials[-1].rate:.2g} lowers the "
            f"validation loss of {before:.4f} in {counted(updates, 'update')}; look at the data "
            "with tlora check, or give --learning-rate"
        )
    return RateSearch(updates, before, trials)


def _climb(trial: Callable[[float], Trial]) -> list[Trial]:
    """Trials up from the first rate while the loss falls; where it does not, down from there."""
    first = trial(FIRST_RATE)
    trials = [first]
    for factor in (FACTOR, 1 / FACTOR):
        best = first
        while LOWEST_RATE <= best.rate * factor <= HIGHEST_RATE:
            trials.append(trial(best.rate * factor))
            too_high = best.loss is None and factor < 1  # every lower rate is better
            if not too_high and _loss(trials[-1]) >= _loss(best):
                break
            best = trials[-1]
        if best is not first:
            break
    return trials


def _loss(trial: Trial) -> float:
    return math.inf if trial.loss is None else trial.loss
