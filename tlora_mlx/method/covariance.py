"""The covariance C of a module's inputs, exactly or through products that never form it.

Modules that read the same input (q, k and v; gate and up) share one C: the first is the leader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.distributed.collectives import total
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.experts import (
    Expert,
    modules_of,
    routed_rows,
    rows_by_expert,
    samples_of,
)
from tlora_mlx.method.layers import Linear, linear_shape, replace_modules
from tlora_mlx.observer import Advance, no_advance


def centred(inputs: mx.array) -> mx.array:
    """X − mean_t X in float32, for one sample's inputs X (T, in) of any float dtype."""
    x = inputs.astype(mx.float32)
    return x - x.mean(axis=0, keepdims=True)


def centred_rows(inputs: mx.array, lengths: Sequence[int]) -> mx.array:
    """All samples' X − mean_t X below each other, (Σ T_n, in) float32.

    So one product with it sums over the samples, which is faster than a product for each.

    Args:
        inputs: (batch, T, in), any float dtype.
        lengths: T_n, each sample's number of tokens; what is behind them is padding.
    """
    return mx.concatenate([centred(inputs[n, :t]) for n, t in enumerate(lengths)])


class _InputTap(nn.Module):
    """Computes what ``linear`` computes, and keeps its most recent input."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        self._seen: tuple[mx.array, ...] | None = None

    def __call__(self, x: mx.array, *experts: mx.array, **options: bool) -> mx.array:
        self._seen = (x, *experts)
        return self.linear(x, *experts, **options)

    def take(self) -> tuple[mx.array, ...]:
        """The recorded input and, for a stacked layer, the experts that its rows go to."""
        seen, self._seen = self._seen, None
        return seen


def _seen(
    model: nn.Module, modules: Mapping[str, nn.Module], tokens: mx.array
) -> Iterator[tuple[str, tuple[mx.array, ...]]]:
    """What each module reads on ``tokens`` (batch, T), in their order; nothing is evaluated.

    A caller that evaluates its result for one input before it asks for the next keeps only the
    activations between the two.
    """
    taps = {name: _InputTap(module) for name, module in modules.items()}
    replace_modules(model, taps)
    try:
        model(tokens)
    finally:
        replace_modules(model, modules)
    for name, tap in taps.items():
        yield name, tap.take()


def _inputs(
    model: nn.Module, linears: Mapping[str, Linear], tokens: mx.array
) -> Iterator[tuple[str, mx.array]]:
    """Each linear layer's input (batch, T, in), and each expert's (1, rows routed to it, in).

    As ``_seen``; an expert without tokens gets one row of zeros.
    """
    for name, (x, *routing) in _seen(model, modules_of(linears), tokens):
        if not routing:
            yield name, x
            continue
        inputs, found = routed_rows(x, *routing), None
        for number, rows in enumerate(rows_by_expert(*routing, _experts(linears, name))):
            if f"{name}.{number}" in linears:
                found = mx.zeros((1, inputs.shape[-1])) if rows is None else inputs[rows]
                yield f"{name}.{number}", found[None]


def _experts(linears: Mapping[str, Linear], name: str) -> int:
    """How many experts the stacked layer ``name`` has."""
    return next(linears[n].switch.num_experts for n in linears if n.startswith(f"{name}."))


def input_leaders(model: nn.Module, targets: Mapping[str, Linear]) -> dict[str, str]:
    """For each module the first one that reads the same input: itself, or an earlier one.

    Experts with the same number share an input if their stacked layers do.
    """
    readers: dict[int, str] = {}
    seen = list(_seen(model, modules_of(targets), mx.array([[0]])))  # an id is of a living object
    first = {name: readers.setdefault(id(x), name) for name, (x, *_) in seen}
    return {
        name: f"{first[switch]}.{target.number}" if isinstance(target, Expert) else first[name]
        for name, target in targets.items()
        for switch in [name.rsplit(".", 1)[0]]
    }


def accumulate(
    model: nn.Module,
    linears: Mapping[str, Linear],
    batches: Iterable[Batch],
    term: Callable[[str, mx.array], mx.array],
    advance: Advance = no_advance,
) -> dict[str, mx.array]:
    """Average ``term(name, X − mean_t X)`` over all samples, in one pass forwards.

    Args:
        model: the base model; its weights stay untouched.
        linears: the modules whose inputs are used, by full name.
        batches: as for ``calibrate``.
        term: a function of a module's name and the samples' centred inputs (N, in), float32, such
            that adding rows adds terms.
        advance: called with each finished batch's number of samples.
    """
    sums: dict[str, mx.array] = {}
    samples = 0
    if any(isinstance(linear, Expert) for linear in linears.values()):
        batches = samples_of(batches)
    for batch in batches:
        lengths = batch.lengths.tolist()
        for name, x in _inputs(model, linears, batch.tokens):
            terms = term(name, centred_rows(x, lengths))
            sums[name] = sums[name] + terms if name in sums else terms
            mx.eval(sums[name])
        samples += len(lengths)
        advance(len(lengths))
    samples = total(mx.array(samples)).item()
    for name, linear in linears.items():
        if name not in sums:  # this process had no sample
            sums[name] = term(name, mx.zeros((1, linear_shape(linear)[1])))
    return {name: total(sums[name]) / samples for name in linears}


def exact_bytes(targets: Mapping[str, Linear], leaders: Iterable[str]) -> int:
    """The size of these leaders' covariances, in bytes of float32."""
    return sum(4 * linear_shape(targets[name])[1] ** 2 for name in set(leaders))


def groups_within(
    targets: Mapping[str, Linear], leaders: Iterable[str], memory: int
) -> list[list[str]]:
    """The leaders in groups, in order, whose covariances fit into ``memory`` bytes together.

    A single covariance that is larger than that makes its own group.
    """
    groups: list[list[str]] = [[]]
    for name in dict.fromkeys(leaders):
        if groups[-1] and exact_bytes(targets, [*groups[-1], name]) > memory:
            groups.append([])
        groups[-1].append(name)
    return groups


def is_streamed(covariance: str, groups: Sequence[Sequence[str]]) -> bool:
    """Whether covariances are never formed: as asked for, or ``auto`` and more than one pass."""
    return covariance == "streaming" or (covariance == "auto" and len(groups) > 1)
