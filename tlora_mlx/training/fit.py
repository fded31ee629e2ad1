"""Whether a run fits into memory, and how long it takes: measured on its largest batches.

What would not fit is not run, since on Metal that ends the process (``training.peak``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
from rich.filesize import decimal

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.method.layers import detach
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.training.memory import machine_memory
from tlora_mlx.training.peak import Peak
from tlora_mlx.training.rehearsal import Duration, Rehearsal, cut_samples
from tlora_mlx.training.setup import Setup, enable_grad_checkpoint

# No shorter length than this is proposed.
SHORTEST = 256


@dataclass(frozen=True)
class Attempt:
    """What the run takes with some options changed.

    Attributes:
        changes: the changed options, as flags; empty for the run as it was given.
        calibration: of calibrating on the longest samples and finding A; None from an adapter.
        update: of an update on the longest batch; None if the calibration does not fit.
    """

    changes: str
    calibration: Peak | None
    update: Peak | None

    def peak(self) -> int:
        """The larger of the two, in bytes."""
        return max(peak.bytes for peak in (self.calibration, self.update) if peak)

    def described(self) -> str:
        """Both peaks, in words."""
        peaks = {"calibration": self.calibration, "an update": self.update}
        return ", ".join(f"{name} {peak.described()}" for name, peak in peaks.items() if peak)


@dataclass(frozen=True)
class Fit:
    """Whether a run fits, and how long it takes.

    Attributes:
        available: bytes that the machine offers.
        weights: bytes of the model by itself.
        longest: rows and tokens of the longest batch of the run as it was given.
        attempts: the run as it was given, then with more and more options changed; the last one
            fits, if any does.
        duration: of the last attempt; None if it does not fit.
    """

    available: int
    weights: int
    longest: tuple[int, int]
    attempts: list[Attempt]
    duration: Duration | None

    def summary(self) -> list[str]:
        """Memory of each attempt beside what there is, and the time that the run takes."""
        rows, tokens = self.longest
        lines = [
            f"memory: this machine offers {decimal(self.available)}, the model takes "
            f"{decimal(self.weights)}; with it, on the longest batch ({rows} × {tokens} tokens):"
        ]
        for attempt in self.attempts:
            fits = "fits" if attempt.peak() <= self.available else "does not fit"
            lines.append(f"  {attempt.changes or 'as given'}: {attempt.described()}: {fits}")
        lines.append(
            f"time: {self.duration.described()}"
            if self.duration
            else "nothing that was tried fits; a 4-bit model (mlx_lm.convert -q) takes less"
        )
        return lines


def measure_fit(
    config: TrainConfig,
    setup: Setup,
    available: int | None = None,
    observer: Observer = SILENT,
) -> Fit:
    """Calibrate on one batch and train on the longest; where that does not fit, with less.

    Changes are tried in the order of what they cost: recomputing activations, smaller batches with
    as many more per update, a streamed covariance, shorter samples.

    Args:
        config: the run's options.
        setup: its model, data and target modules; the model is the base model afterwards.
        available: bytes to fit into; default: what the machine offers.
        observer: notified of each attempt.

    Raises:
        UserError: a module cannot be calibrated, or the adapter to start from does not fit.
        RunError: a statistic is not finite.
    """
    model = setup.base.model
    available, weights = available or machine_memory(), mx.get_active_memory()
    calls = {type(block): type(block).__call__ for block in model.layers}
    attempts: list[Attempt] = []
    longest = beginning = duration = None
    try:
        for changed, changes in _with_less(config, setup.data["train"].longest()):
            if changes == "--grad-checkpoint":
                enable_grad_checkpoint(model)
            if not (samples := cut_samples(setup.data["train"], changed.max_seq_length)):
                break  # so short that every answer is cut away
            observer.note(f"trying {changes}" if changes else "trying the run as it is")
            rehearsal = Rehearsal(changed, setup, samples, available)
            longest = longest or rehearsal.longest
            if beginning is None or beginning.start is None:
                beginning = rehearsal.calibrate()
            update = rehearsal.update(beginning.start) if beginning.start else None
            attempts.append(Attempt(changes, beginning.peak, update))
            if update and attempts[-1].peak() <= available:
                duration = rehearsal.duration(beginning.seconds)
            detach(model)
            if duration:
                break
    finally:
        detach(model)
        for block, call in calls.items():
            block.__call__ = call
    return Fit(available, weights, longest, attempts, duration)


def _with_less(config: TrainConfig, longest: int) -> Iterator[tuple[TrainConfig, str]]:
    """The options as given, then with less and less memory, and the changed ones as flags.

    Args:
        config: the options as given.
        longest: tokens of the longest sample.
    """
    flags: dict[str, str] = {}

    def changed(**options: object) -> tuple[TrainConfig, str]:
        nonlocal config
        config = replace(config, **options)
        return config, " ".join(filter(None, flags.values()))

    yield changed()
    if not config.grad_checkpoint:
        flags["grad_checkpoint"] = "--grad-checkpoint"
        yield changed(grad_checkpoint=True)
    while config.batch_size > 1:
        size = config.batch_size // 2
        steps = -(-config.grad_accumulation_steps * config.batch_size // size)
        flags["batch_size"] = f"--batch-size {size} --grad-accumulation-steps {steps}"
        yield changed(batch_size=size, grad_accumulation_steps=steps)
    if config.covariance != "streaming" and not config.from_adapter:
        flags["covariance"] = "--covariance streaming"
        yield changed(covariance="streaming")
    while longest // 2 >= SHORTEST:
        length = longest = longest // 2
        flags["max_seq_length"] = f"--max-seq-length {length}"
        yield changed(max_seq_length=length)
