"""The memory and the time of a run's parts, measured on its own largest batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import mlx.core as mx

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.data.batches import collate
from tlora_mlx.data.samples import Sample, Split, draw_samples
from tlora_mlx.errors import counted
from tlora_mlx.method.allocation import plan_ranks
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.calibration import calibrate
from tlora_mlx.method.covariance import (
    exact_bytes,
    groups_within,
    input_leaders,
    is_streamed,
)
from tlora_mlx.method.initialise import Initialisation, streamed_bytes
from tlora_mlx.method.layers import attach, linear_shape
from tlora_mlx.method.output_layer import is_separable
from tlora_mlx.observer import Advance, Observer
from tlora_mlx.training.loop import batches_per_epoch, total_updates, training_batches
from tlora_mlx.training.peak import SHORTEST_PART, Peak, peak_of
from tlora_mlx.training.planning import allowed_memory
from tlora_mlx.training.setup import Setup
from tlora_mlx.training.start import find_start
from tlora_mlx.training.step import Step, make_optimizer
from tlora_mlx.training.validation import mean_loss


@dataclass(frozen=True)
class Duration:
    """How long a run takes, in seconds, extrapolated from measured parts.

    Attributes:
        initialisation: calibration and finding A; 0 from an adapter.
        training: all updates.
        validation: all validations.
        updates: how many there are.
        tokens_per_second: in training; padding is not counted.
    """

    initialisation: float
    training: float
    validation: float
    updates: int
    tokens_per_second: float

    def described(self) -> str:
        """The whole and its parts, in words."""
        parts = {
            "to initialise": self.initialisation,
            f"for {counted(self.updates, 'update')} at {self.tokens_per_second:,.0f} tokens/s": (
                self.training
            ),
            "to validate": self.validation,
        }
        shown = [f"{_span(seconds)} {what}" for what, seconds in parts.items() if seconds]
        return f"about {_span(sum(parts.values()))}: {', '.join(shown)}"


class Beginning(NamedTuple):
    """What comes before training.

    Attributes:
        peak: of calibrating and finding A; None from an adapter.
        start: what training starts from; None if the calibration does not fit.
        seconds: of the whole initialisation, extrapolated from the samples that were taken.
    """

    peak: Peak | None
    start: Initialisation | None
    seconds: float


def cut_samples(train: Split, length: int) -> list[Sample]:
    """A split's samples cut to a length; those with nothing to learn are left out."""
    cut = (sample.cut(length) for sample in train.samples)
    return [sample for sample in cut if sample.counts().any()]


class Rehearsal:
    """A run's parts on its largest batches; ``calibrate`` comes first, ``duration`` last.

    Args:
        config: the run's options.
        setup: model, data and target modules.
        samples: the training samples, cut as the options say.
        available: bytes that may be used; what would take more is not run.
    """

    def __init__(
        self, config: TrainConfig, setup: Setup, samples: Sequence[Sample], available: int
    ):
        self._config, self._setup, self._available = config, setup, available
        self._samples, self._longest = samples, _longest(samples, config.batch_size)
        self._step: Callable[[Sequence[Sample]], None]

    @property
    def longest(self) -> tuple[int, int]:
        """Rows and tokens of the longest batch."""
        return len(self._longest), len(self._longest[0].tokens)

    def calibrate(self) -> Beginning:
        """Calibrate on the longest of the calibration samples and find A from them alone."""
        config, setup = self._config, self._setup
        if config.from_adapter:
            return Beginning(None, find_start(config, setup), 0.0)
        drawn = draw_samples(self._samples, config.calibration_samples, config.seed)
        longest = _longest(drawn, config.batch_size)
        found, watch = [], _Stopwatch()

        def work(samples: Sequence[Sample]) -> None:
            if samples is longest:
                data = {**setup.data, "train": Split(list(longest))}
                found.append(find_start(config, replace(setup, data=data), watch))
            else:
                calibrate(setup.base.model, setup.targets, [_batch(samples)])

        peak = peak_of(work, longest, self._available, self._covariance_bytes())
        seconds = watch.seconds(_tokens(drawn) / _tokens(longest))
        return Beginning(peak, found[0] if found else None, seconds)

    def _covariance_bytes(self) -> int:
        """What the covariances take, as ``initialise`` keeps them; with streaming, about."""
        config, targets = self._config, self._setup.targets
        shapes = {name: linear_shape(module) for name, module in targets.items()}
        leaders = input_leaders(self._setup.base.model, targets)
        groups = groups_within(targets, leaders.values(), allowed_memory(config))
        if not is_streamed(config.covariance, groups):
            return max(exact_bytes(targets, group) for group in groups)
        plan = plan_ranks(dict.fromkeys(shapes, 1.0), shapes, config.rank, config.alpha)
        return streamed_bytes(plan)

    def update(self, start: Initialisation) -> Peak:
        """Attach the adapter and update it once on the longest batch."""
        model, config = self._setup.base.model, self._config
        attach(model, start.plan, start.a)
        model.eval()
        separable = is_separable(model, mx.array([self._longest[0].tokens[:SHORTEST_PART]]))
        model.train()
        step = Step(model, make_optimizer(config, model), config, separable)
        self._step = lambda samples: step([list(samples)], 0.0, 0)
        return peak_of(self._step, self._longest, self._available)

    def duration(self, initialisation: float) -> Duration:
        """The time of the whole run, after an update that fitted, and so many seconds before it.

        A batch's time is linear in its tokens, through two measured ones: the longest and the
        median batch.
        """
        config, samples = self._config, self._samples
        batches = list(
            islice(training_batches(samples, config, 0), batches_per_epoch(len(samples), config))
        )
        median = sorted(batches, key=_tokens)[len(batches) // 2]
        seconds = _line(
            *(
                (_tokens(batch), _seconds(lambda b=batch: self._step(b)))
                for batch in (median, self._longest)
            )
        )
        updates = total_updates(len(samples), config)
        epochs = updates * config.grad_accumulation_steps / len(batches)
        training = epochs * sum(seconds(_tokens(batch)) for batch in batches)
        tokens = epochs * sum(len(sample.tokens) for sample in samples)
        return Duration(
            initialisation, training, self._validation(updates), updates, tokens / training
        )

    def _validation(self, updates: int) -> float:
        """Seconds of all validations: before training, every so often, and at the end."""
        config, valid = self._config, self._setup.data["valid"].samples
        if not valid:
            return 0.0
        size = config.batch_size
        batches = -(-len(valid) // size)
        if config.val_batches > 0:
            batches = min(batches, config.val_batches)
        median = sorted(valid, key=lambda sample: len(sample.tokens))[len(valid) // 2]
        batch = _batch([median] * size)
        times = 1 + -(-updates // config.steps_per_eval)
        return times * batches * _seconds(lambda: mean_loss(self._setup.base.model, [batch]))


class _Stopwatch(Observer):
    """Takes the time of the stages of an initialisation."""

    def __init__(self) -> None:
        self._by_batch = self._once = 0.0

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A stage takes time for each batch if it says that it advances, else once."""
        start, advanced = time.perf_counter(), []
        yield lambda *_: advanced.append(True)
        seconds = time.perf_counter() - start
        if advanced:
            self._by_batch += seconds
        else:
            self._once += seconds

    def seconds(self, share: float) -> float:
        """The time with so many times as many tokens."""
        return share * self._by_batch + self._once


def _span(seconds: float) -> str:
    """A time in words: seconds, minutes, or hours and minutes."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _longest(samples: Sequence[Sample], number: int) -> list[Sample]:
    """So many of the longest samples, longest first."""
    return sorted(samples, key=lambda sample: -len(sample.tokens))[:number]


def _batch(samples: Sequence[Sample]) -> Batch:
    return collate(samples, max(len(sample.tokens) for sample in samples))


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.tokens) for sample in samples)


def _seconds(work: Callable[[], object]) -> float:
    """Of the second call: the first one may compile."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _line(first: tuple[int, float], second: tuple[int, float]) -> Callable[[float], float]:
    """The line through two measurements; through the origin if they do not rise."""
    (x_0, y_0), (x_1, y_1) = first, second
    if x_1 == x_0 or y_1 <= y_0:
        return lambda x: y_0 / x_0 * x
    slope = (y_1 - y_0) / (x_1 - x_0)
    return lambda x: max(y_0 + slope * (x - x_0), 0.0)
