"""The covariance C of what a module reads, exactly or through products that never form it.

Modules that read the same input (q, k and v; gate and up) share one C: the first of them leads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.method.batch import Batch
from tlora_mlx.method.distributed import total
from tlora_mlx.method.layers import linear_shape, replace_modules


def centred(inputs: mx.array) -> mx.array:
    """X − mean_t X in float32, of one sample's inputs X (T, in) of any float dtype."""
    x = inputs.astype(mx.float32)
    return x - x.mean(axis=0, keepdims=True)


def centred_gram(inputs: mx.array) -> mx.array:
    """One sample's contribution to C, before the average over samples.

    Args:
        inputs: X (T, in), the module's inputs on all tokens of one sample, any float dtype.

    Returns:
        (X − mean_t X)ᵀ (X − mean_t X), (in, in) float32: centred per sample, summed over its
        tokens and not divided by their number.

    Source: Rambo-Yi/TLora e3463ae, ``peft/tuners/lora/tlora.py::preprocess_tlora``.
    """
    x = centred(inputs)
    return x.T @ x


class _Recorder(nn.Module):
    """Computes what ``linear`` computes, and keeps the input it saw last."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        self._seen: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        self._seen = x
        return self.linear(x)

    def take(self) -> mx.array:
        seen, self._seen = self._seen, None
        return seen


def _inputs(
    model: nn.Module, linears: Mapping[str, nn.Module], tokens: mx.array
) -> Iterator[tuple[str, mx.array]]:
    """Each module's input on ``tokens`` (batch, T), in the modules' order; nothing is evaluated.

    Whoever evaluates what it makes of one input before it asks for the next keeps no more than the
    activations between the two.
    """
    recorders = {name: _Recorder(linear) for name, linear in linears.items()}
    replace_modules(model, recorders)
    try:
        model(tokens)
    finally:
        replace_modules(model, linears)
    for name, recorder in recorders.items():
        yield name, recorder.take()


def input_leaders(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, str]:
    """For each module the first one that reads the same input: itself, or one before it."""
    readers: dict[int, str] = {}
    inputs = list(_inputs(model, targets, mx.array([[0]])))  # kept: an id is of a living object
    return {name: readers.setdefault(id(x), name) for name, x in inputs}


def accumulate(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    term: Callable[[str, mx.array], mx.array],
    on_batch: Callable[[int], None] = lambda samples: None,
) -> dict[str, mx.array]:
    """Average ``term(name, X − mean_t X)`` over all samples, in one pass forwards.

    Args:
        model: the base model; its weights stay untouched.
        linears: the modules whose inputs are looked at, by full name.
        batches: as for ``calibrate``.
        term: of a module's name and one sample's centred inputs (T, in), float32.
        on_batch: called with the number of samples of each batch that is done.
    """
    sums: dict[str, mx.array] = {}
    samples = 0
    for batch in batches:
        lengths = batch.spans[:, 1].tolist()
        for name, x in _inputs(model, linears, batch.tokens):
            terms = sum(term(name, centred(x[n, :t])) for n, t in enumerate(lengths))
            sums[name] = sums[name] + terms if name in sums else terms
            mx.eval(sums[name])
        samples += len(lengths)
        on_batch(len(lengths))
    samples = total(mx.array(samples)).item()
    for name, linear in linears.items():
        if name not in sums:  # this process had no sample
            sums[name] = term(name, mx.zeros((1, linear_shape(linear)[1])))
    return {name: total(sums[name]) / samples for name in linears}


def exact_bytes(targets: Mapping[str, nn.Module], leaders: Iterable[str]) -> int:
    """What the covariances of these leaders take, float32."""
    return sum(4 * linear_shape(targets[name])[1] ** 2 for name in set(leaders))


def groups_within(
    targets: Mapping[str, nn.Module], leaders: Iterable[str], memory: int
) -> list[list[str]]:
    """The leaders in groups, in order, whose covariances fit into ``memory`` bytes together.

    A covariance that is larger by itself makes a group of its own.
    """
    groups: list[list[str]] = [[]]
    for name in dict.fromkeys(leaders):
        if groups[-1] and exact_bytes(targets, [*groups[-1], name]) > memory:
            groups.append([])
        groups[-1].append(name)
    return groups
