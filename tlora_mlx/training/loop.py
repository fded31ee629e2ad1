"""The training loop: B alone is trained, the loss is a mean over the tokens that count."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from tlora_mlx.config import TrainConfig
from tlora_mlx.errors import Interrupted, RunError
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.distributed import largest, processes, rank, share, total, total_of_tree
from tlora_mlx.method.loss import masked_cross_entropy
from tlora_mlx.training.checkpoint import Progress, Window
from tlora_mlx.training.data import Sample, Split, batches_in_order, collate, epoch_order
from tlora_mlx.training.progress import bar, say
from tlora_mlx.training.schedule import learning_rate


class Recorder(Protocol):
    """Where a run's reports and states go (``run_writer.RunWriter``)."""

    def report(self, metrics: dict[str, float | None]) -> None:
        """Take one report, as ``metrics.jsonl`` has it."""

    def checkpoint(self, model: nn.Module, optimizer: optim.Optimizer, progress: Progress) -> None:
        """Keep all that the rest of the run depends on."""

    def best(self, model: nn.Module) -> None:
        """Keep the adapter: its validation loss is the lowest so far."""


def summed_loss(model: nn.Module, tokens: mx.array, spans: mx.array) -> tuple[mx.array, mx.array]:
    """The loss summed over the tokens that count, and their number; both scalars, float32."""
    losses, counts = masked_cross_entropy(model(tokens[:, :-1]), tokens, spans)
    return losses.sum(), counts.sum()


def mean_loss(model: nn.Module, batches: Iterable[Batch | None], done: Callable[[], None]) -> float:
    """The mean loss per token that counts; every batch weighs as many tokens as it has.

    Under ``mlx.launch`` each process gives its part of each batch (None: it has none), and all get
    the mean over all.
    """
    model.eval()
    sums = [0.0, 0.0]
    for batch in batches:
        if batch:
            loss, n = summed_loss(model, *batch)
            sums[0] += loss.item()
            sums[1] += n.item()
        done()
    if processes() > 1:
        sums = total(mx.array(sums)).tolist()
    return sums[0] / sums[1]


def evaluate(
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    name: str,
    limit: int,
    stops: list[int] | None = None,
) -> float:
    """``mean_loss`` over a split, or over ``limit`` evenly spread batches of it, under a bar.

    Raises:
        Interrupted: ``stops`` is not empty any more, in any process.
    """
    samples = split.samples
    if 0 < limit * config.batch_size < len(samples):
        step = len(samples) / (limit * config.batch_size)
        samples = [samples[int(i * step)] for i in range(limit * config.batch_size)]
    with bar(name, -(-len(samples) // config.batch_size)) as advance:

        def done() -> None:
            advance()
            if stops is not None and (stop := agreed(stops)):
                raise Interrupted("", 128 + stop)

        batches = batches_in_order(samples, config.batch_size, config.max_seq_length)
        return mean_loss(model, batches, done)


def batches_per_epoch(samples: int, config: TrainConfig) -> int:
    """How many micro-batches an epoch has, the last partial one included."""
    return -(-samples // config.batch_size)


def total_updates(samples: int, config: TrainConfig) -> int:
    """How many optimizer updates a run takes: ``iters``, or ``epochs`` times those of an epoch."""
    if config.epochs is None:
        return config.iters
    batches = config.epochs * batches_per_epoch(samples, config)
    return -(-batches // config.grad_accumulation_steps)


def training_batches(
    samples: list[Sample], config: TrainConfig, start: int
) -> Iterator[list[Sample]]:
    """Micro-batch after micro-batch from number ``start`` on; ``epochs``, if given, ends them."""
    lengths = [len(sample.tokens) for sample in samples]
    first, skip = divmod(start, batches_per_epoch(len(samples), config))
    for epoch in range(first, config.epochs) if config.epochs else count(first):
        order = epoch_order(lengths, config.batch_size, config.seed, epoch)
        for numbers in order[skip:]:
            yield [samples[i] for i in numbers]
        skip = 0


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list, so that the loop can finish its step first.

    A second signal is acted on at once, by the handler that was there before. SIGHUP is what ssh
    makes of a Ctrl-C at ``mlx.launch``; where it is ignored (nohup), it stays so.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {n: signal.signal(n, note) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def agreed(stops: list[int]) -> int:
    """The signal that came, to this process or any other, so that all stop after the same step."""
    return largest(stops[0] if stops else 0)


def make_optimizer(
    config: TrainConfig, model: nn.Module, state: Mapping[str, mx.array] | None = None
) -> optim.Optimizer:
    """The optimizer for the model's trainable parameters; its rate is set before each update.

    With bias correction, as published and as in torch; MLX's default is without.

    Args:
        config: the run's options.
        model: with ``TLoRALinear`` layers attached.
        state: as a checkpoint keeps it, by flattened name.
    """
    if config.optimizer == "adamw":
        optimizer = optim.AdamW(0.0, weight_decay=config.weight_decay, bias_correction=True)
    else:
        optimizer = optim.Adam(0.0, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    if state:
        # In the order that init gave: mx.compile fuses by it, and so rounds by it.
        names = [name for name, _ in tree_flatten(optimizer.state)]
        optimizer.state = tree_unflatten([(name, state[name]) for name in names])
    return optimizer


def fit(
    model: nn.Module,
    optimizer: optim.Optimizer,
    train: Split,
    valid: Split,
    config: TrainConfig,
    progress: Progress,
    recorder: Recorder,
) -> None:
    """Train the model's trainable parameters in place, from where ``progress`` stands to the end.

    All that follows depends on the arguments alone, so that a run that goes on from a checkpoint
    ends with the same bits as one that was never cut (on the CPU).

    Args:
        model: with ``TLoRALinear`` layers attached.
        optimizer: from ``make_optimizer``, its state as of ``progress``.
        train: samples to learn from.
        valid: samples to validate on; may be empty.
        config: the run's options.
        progress: brought forward in place.
        recorder: is given each report: ``iteration`` and either ``train_loss``, ``learning_rate``,
            ``grad_norm`` (of the last update, before clipping), ``iterations_per_second``,
            ``tokens_per_second``, ``trained_tokens`` and ``peak_memory`` (GB), or ``val_loss`` and
            ``val_time`` (s); and a state every ``save_every`` updates and before it is left.

    Raises:
        RunError: a loss or gradient is not finite; the weights are those of the last good update.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; the weights are those of the last update.
    """
    updates = total_updates(len(train), config)
    step = _Step(model, optimizer, config)
    batches = training_batches(train.samples, config, progress.batches)
    model.train()
    with bar("training", updates, progress.iteration) as advance, stop_requests() as stops:
        while not progress.finished:
            try:
                if valid.samples and _validation_is_due(progress, updates, config):
                    _validate(model, valid, config, progress, recorder, stops)
                if stop := agreed(stops):
                    raise Interrupted("", 128 + stop)
            except Interrupted as interruption:
                recorder.checkpoint(model, optimizer, progress)
                raise Interrupted(
                    f"interrupted after iteration {progress.iteration} of {updates}",
                    interruption.exit_code,
                ) from None
            if progress.iteration == updates or 0 < (config.early_stop or 0) <= progress.stale:
                if progress.iteration < updates:
                    say(
                        f"stopped early: the last {progress.stale} validations were not below "
                        f"{progress.best_loss:.4f}"
                    )
                progress.finished = True
                recorder.checkpoint(model, optimizer, progress)
                break

            start = time.perf_counter()
            rate = learning_rate(
                progress.iteration, updates, config.learning_rate, config.lr_schedule, config.warmup
            )
            samples = list(islice(batches, config.grad_accumulation_steps))
            loss, tokens, norm = step(samples, rate, progress.batches)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = _not_finite(progress.iteration + 1, loss, samples, train)
                if progress.skipped == config.skip_nonfinite:
                    recorder.checkpoint(model, optimizer, progress)
                    raise RunError(
                        f"{what}; the weights of iteration {progress.iteration} are untouched and "
                        "saved: look at these samples, try a lower --learning-rate, or leave such "
                        f"updates out with --skip-nonfinite {progress.skipped + 1}"
                    )
                progress.skipped += 1
                say(f"{what}; left out ({progress.skipped} of {config.skip_nonfinite})")
                loss = tokens = 0
            progress.iteration += 1
            progress.batches += len(samples)
            _count(progress, loss, tokens, time.perf_counter() - start)
            window = progress.window
            if window.tokens:
                advance(1, _bar_text(window))
            if progress.iteration % config.steps_per_report == 0 or progress.iteration == updates:
                _report(progress, rate, norm, recorder)
            if progress.iteration % config.save_every == 0 and progress.iteration != updates:
                recorder.checkpoint(model, optimizer, progress)


class _Step:
    """One optimizer update: gradients of some micro-batches, added up, checked, applied."""

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer, config: TrainConfig):
        self.optimizer, self.config = optimizer, config
        self._trained = model.trainable_parameters
        self._state = [model.state, optimizer.state]
        mx.eval(self._state)
        loss_and_gradient = nn.value_and_grad(model, summed_loss)
        # A base model's dropout draws from MLX's random state.
        inputs = [model.state, mx.random.state]

        @partial(mx.compile, inputs=inputs, outputs=inputs)
        def gradient(tokens: mx.array, spans: mx.array):
            (loss, n), gradients = loss_and_gradient(model, tokens, spans)
            return loss, n, gradients

        @mx.compile
        def clip(gradients, n: mx.array):
            gradients = tree_map(lambda g: g / n, gradients)
            return optim.clip_grad_norm(gradients, config.max_grad_norm or math.inf)

        @partial(mx.compile, inputs=self._state, outputs=self._state)
        def update(gradients):
            optimizer.update(model, gradients)

        self._gradient, self._clip, self._update = gradient, clip, update

    def __call__(
        self, batches: list[list[Sample]], rate: float, number: int
    ) -> tuple[float, int, float]:
        """Update the model unless loss or gradient are not finite.

        Args:
            batches: the micro-batches' samples; under ``mlx.launch`` all processes have the same,
                and each takes its share of each.
            rate: learning rate.
            number: of the first micro-batch in the run; with the seed and the process's own number
                it gives the random state.

        Returns:
            The summed loss, the number of tokens that counted, and the mean gradient's norm.
        """
        mx.random.seed(((self.config.seed << 32) + (rank() << 56) + number) % 2**64)
        total = None
        for samples in filter(None, map(share, batches)):
            result = self._gradient(*collate(samples, self.config.max_seq_length))
            # Sums, not means: a token weighs the same in each micro-batch.
            total = result if total is None else tree_map(mx.add, total, result)
            mx.eval(total)
        if total is None:  # more processes than samples
            total = mx.array(0.0), mx.array(0.0), tree_map(mx.zeros_like, self._trained())
        loss, n, gradients = total_of_tree(total)
        gradients, norm = self._clip(gradients, n)
        mx.eval(gradients, norm)
        if math.isfinite(loss.item()) and math.isfinite(norm.item()):
            self.optimizer.learning_rate = rate
            self._update(gradients)
            mx.eval(self._state)
        return loss.item(), int(n.item()), norm.item()


def _validation_is_due(progress: Progress, updates: int, config: TrainConfig) -> bool:
    now = progress.iteration
    return progress.validated != now and (now % config.steps_per_eval == 0 or now == updates)


def _validate(
    model: nn.Module,
    valid: Split,
    config: TrainConfig,
    progress: Progress,
    recorder: Recorder,
    stops: list[int],
) -> None:
    start = time.perf_counter()
    loss = evaluate(model, valid, config, "validating", config.val_batches, stops)
    model.train()
    now = progress.validated = progress.iteration
    known = loss if math.isfinite(loss) else None
    progress.val_loss = known
    if now == 0:  # the base model's: B is zero
        progress.first_val_loss = known
    elif known is not None and (progress.best_loss is None or known < progress.best_loss):
        progress.best_loss, progress.best_iteration, progress.stale = known, now, 0
        recorder.best(model)
    else:
        progress.stale += 1
    say(f"iteration {now}: validation loss {loss:.4f}")
    seconds = time.perf_counter() - start
    recorder.report({"iteration": now, "val_loss": known, "val_time": seconds})


def _not_finite(iteration: int, loss: float, batches: list[list[Sample]], train: Split) -> str:
    """What was not finite, and in which samples."""
    what = "gradient" if math.isfinite(loss) else "loss"
    rows = sorted(sample.row for samples in batches for sample in samples)
    shown = ", ".join(map(str, rows[:20])) + (", …" if len(rows) > 20 else "")
    return f"the {what} is not finite in iteration {iteration} ({train.where} {shown})"


def _count(progress: Progress, loss: float, tokens: int, seconds: float) -> None:
    progress.trained_tokens += tokens
    progress.seconds += seconds
    window = progress.window
    window.loss += loss
    window.tokens += tokens
    window.seconds += seconds
    window.updates += 1


def _bar_text(window: Window) -> str:
    return (
        f"loss {window.loss / window.tokens:.3f}, {window.tokens / window.seconds:.0f} tokens/s, "
        f"{mx.get_peak_memory() / 1e9:.2f} GB"
    )


def _report(progress: Progress, rate: float, norm: float, recorder: Recorder) -> None:
    """Report what the window holds, and empty it."""
    window = progress.window
    metrics = {
        "iteration": progress.iteration,
        "train_loss": window.loss / window.tokens if window.tokens else None,
        "learning_rate": rate,
        "grad_norm": norm if math.isfinite(norm) else None,
        "iterations_per_second": window.updates / window.seconds,
        "tokens_per_second": window.tokens / window.seconds,
        "trained_tokens": progress.trained_tokens,
        "peak_memory": mx.get_peak_memory() / 1e9,
    }
    progress.window = Window()
    recorder.report(metrics)
    if metrics["train_loss"] is not None:
        say(
            f"iteration {progress.iteration}: train loss {metrics['train_loss']:.4f}, learning "
            f"rate {rate:.2e}, {metrics['tokens_per_second']:.0f} tokens/s, peak memory "
            f"{metrics['peak_memory']:.2f} GB"
        )
