"""The training loop: B alone is trained, the loss is a mean over the tokens that count."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, islice

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from tlora_mlx.config import TrainConfig
from tlora_mlx.errors import Interrupted, RunError
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.loss import masked_cross_entropy
from tlora_mlx.training.data import Sample, Split, batches_in_order, collate, epoch_order
from tlora_mlx.training.progress import bar, say
from tlora_mlx.training.schedule import learning_rate


def summed_loss(model: nn.Module, tokens: mx.array, spans: mx.array) -> tuple[mx.array, mx.array]:
    """The loss summed over the tokens that count, and their number; both scalars, float32."""
    losses, counts = masked_cross_entropy(model(tokens[:, :-1]), tokens, spans)
    return losses.sum(), counts.sum()


def mean_loss(model: nn.Module, batches: Iterable[Batch], done: Callable[[], None]) -> float:
    """The mean loss per token that counts; every batch weighs as many tokens as it has."""
    model.eval()
    total, tokens = 0.0, 0.0
    for batch in batches:
        loss, n = summed_loss(model, *batch)
        total += loss.item()
        tokens += n.item()
        done()
    return total / tokens


def evaluate(model: nn.Module, split: Split, config: TrainConfig, name: str, limit: int) -> float:
    """``mean_loss`` over a split, or over ``limit`` evenly spread batches of it, under a bar."""
    samples = split.samples
    if 0 < limit * config.batch_size < len(samples):
        step = len(samples) / (limit * config.batch_size)
        samples = [samples[int(i * step)] for i in range(limit * config.batch_size)]
    with bar(name, -(-len(samples) // config.batch_size)) as advance:
        batches = batches_in_order(samples, config.batch_size, config.max_seq_length)
        return mean_loss(model, batches, advance)


def total_updates(samples: int, config: TrainConfig) -> int:
    """How many optimizer updates a run takes: ``iters``, or ``epochs`` times those of an epoch."""
    if config.epochs is None:
        return config.iters
    batches = -(-samples // config.batch_size)
    return -(-config.epochs * batches // config.grad_accumulation_steps)


def training_batches(samples: list[Sample], config: TrainConfig) -> Iterator[Batch]:
    """Batches epoch after epoch, without end unless ``epochs`` gives one."""
    lengths = [len(sample.tokens) for sample in samples]
    for epoch in range(config.epochs) if config.epochs else count():
        for numbers in epoch_order(lengths, config.batch_size, config.seed, epoch):
            yield collate([samples[i] for i in numbers], config.max_seq_length)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that the loop can finish its step first.

    A second signal is acted on at once, by the handler that was there before.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def fit(
    model: nn.Module,
    train: Split,
    valid: Split,
    config: TrainConfig,
    report: Callable[[dict[str, float]], None],
    save: Callable[[int], None],
) -> None:
    """Train the model's trainable parameters in place.

    Args:
        model: with ``TLoRALinear`` layers attached.
        train: samples to learn from.
        valid: samples to validate on; may be empty.
        config: the run's options.
        report: called with each report, as ``metrics.jsonl`` has it: ``iteration`` and either
            ``train_loss``, ``learning_rate``, ``iterations_per_second``, ``tokens_per_second``,
            ``trained_tokens`` and ``peak_memory`` (GB), or ``val_loss`` and ``val_time`` (s).
        save: called with the number of updates done, every ``save_every``.

    Raises:
        RunError: a loss or gradient is not finite; the weights are those of the last good update.
        Interrupted: SIGINT or SIGTERM came; the weights are those of the last update.
    """
    updates = total_updates(len(train), config)
    optimizer = _optimizer(config)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    mx.eval(state)
    loss_and_gradient = nn.value_and_grad(model, summed_loss)

    @partial(mx.compile, inputs=[model.state], outputs=[model.state])
    def gradient(tokens: mx.array, spans: mx.array):
        (loss, n), gradients = loss_and_gradient(model, tokens, spans)
        return loss, n, gradients

    @partial(mx.compile, inputs=state, outputs=state)
    def update(gradients, n: mx.array):
        optimizer.update(model, tree_map(lambda g: g / n, gradients))

    def validate(iteration: int) -> None:
        if valid.samples:
            start = time.perf_counter()
            loss = evaluate(model, valid, config, "validating", config.val_batches)
            say(f"iteration {iteration}: validation loss {loss:.4f}")
            report(
                {
                    "iteration": iteration,
                    "val_loss": loss,
                    "val_time": time.perf_counter() - start,
                }
            )
        model.train()

    batches = training_batches(train.samples, config)
    window = _Window()
    validate(0)
    with bar("training", updates) as advance, stop_requests() as stops:
        for done in range(1, updates + 1):
            start = time.perf_counter()
            rate = learning_rate(
                done - 1, updates, config.learning_rate, config.lr_schedule, config.warmup
            )
            optimizer.learning_rate = rate
            loss, n, gradients = _accumulate(
                gradient, islice(batches, config.grad_accumulation_steps)
            )
            if not _all_finite(loss, gradients):
                raise RunError(
                    f"the loss or its gradient is not finite in iteration {done}; the weights of "
                    f"iteration {done - 1} are untouched: try a lower --learning-rate"
                )
            update(gradients, n)
            mx.eval(state)
            window.add(loss.item(), n.item(), time.perf_counter() - start)
            advance(1, f"loss {loss.item() / n.item():.3f}")
            if done % config.steps_per_report == 0 or done == updates:
                metrics = window.close(done, rate)
                report(metrics)
                say(
                    f"iteration {done}: train loss {metrics['train_loss']:.4f}, learning rate "
                    f"{rate:.2e}, {metrics['tokens_per_second']:.0f} tokens/s, peak memory "
                    f"{metrics['peak_memory']:.2f} GB"
                )
            if stops:
                raise Interrupted(
                    f"interrupted after iteration {done} of {updates}", 128 + stops[0]
                )
            if done % config.steps_per_eval == 0 or done == updates:
                validate(done)
            if done % config.save_every == 0 and done != updates:
                save(done)


def _optimizer(config: TrainConfig) -> optim.Optimizer:
    # With bias correction, as Adam was published and as torch has it; MLX's default is without.
    if config.optimizer == "adamw":
        return optim.AdamW(0.0, weight_decay=config.weight_decay, bias_correction=True)
    return optim.Adam(0.0, bias_correction=True)


def _accumulate(gradient, batches: Iterable[Batch]):
    """Sum loss, token count and gradients over micro-batches: a token weighs the same in each."""
    total = None
    for batch in batches:
        result = gradient(*batch)
        total = result if total is None else tree_map(mx.add, total, result)
        mx.eval(total)
    return total


def _all_finite(loss: mx.array, gradients) -> bool:
    checks: list[mx.array] = [mx.isfinite(loss)]
    tree_map(lambda g: checks.append(mx.isfinite(g).all()), gradients)
    return mx.stack(checks).all().item()


class _Window:
    """Sums between two reports."""

    def __init__(self):
        self.trained_tokens = 0
        self._reset()

    def _reset(self) -> None:
        self.loss = self.tokens = self.seconds = 0.0
        self.updates = 0

    def add(self, loss: float, tokens: float, seconds: float) -> None:
        self.loss += loss
        self.tokens += tokens
        self.seconds += seconds
        self.updates += 1

    def close(self, iteration: int, rate: float) -> dict[str, float]:
        self.trained_tokens += int(self.tokens)
        metrics = {
            "iteration": iteration,
            "train_loss": self.loss / self.tokens,
            "learning_rate": rate,
            "iterations_per_second": self.updates / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "trained_tokens": self.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        self._reset()
        return metrics
