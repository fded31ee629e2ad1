"""Several adapters into one, by the combination types of PEFT's ``add_weighted_adapter``.

Names and semantics are PEFT's (``tuners/lora/model.py``, ``utils/merge_utils.py``): each module is
combined over the adapters that have it, and the result has scale 1.

- ``cat``: A and B are stacked, which gives exactly the weighted sum of the deltas; ranks add up.
- ``svd``: that sum truncated to its largest singular values, the best approximation of that rank.
- ``linear``: A and B are summed separately, with the square roots of the weights. Cheap, but not
  the sum of the deltas: A of one adapter meets B of another. Ranks must be equal.
- ``ties``: A and B are each pruned to the largest entries; of those, the entries that have the
  majority's sign are kept. Ranks must be equal.
- ``dare_linear``, ``dare_ties``: A and B are each pruned at random and scaled up, then summed or
  combined by majority. Ranks must be equal.
- ``ties_svd``, ``dare_linear_svd``, ``dare_ties_svd``: the same on the deltas themselves, then
  truncated as by ``svd``. Ranks may differ.

For a single adapter PEFT always uses ``linear``; this does what was asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.errors import UserError
from tlora_mlx.method import linalg
from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.method.subspace import top_right_vectors
from tlora_mlx.observer import Advance, no_advance

# The types that can combine adapters of different ranks.
ANY_RANK = ("cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd")


@dataclass(frozen=True)
class Combination:
    """How adapters are combined.

    Attributes:
        type: one of PEFT's names, above.
        density: the share of entries that TIES and DARE keep; other types ignore it.
        svd_rank: the rank that ``svd`` and ``…_svd`` truncate to; None: the adapters' largest.
        majority_sign: ``total`` (the sign of the sum) or ``frequency`` (that of the sum of signs).
        seed: for DARE's random choice.
    """

    type: str = "cat"
    density: float = 1.0
    svd_rank: int | None = None
    majority_sign: str = "total"
    seed: int = 0


class Part(NamedTuple):
    """One adapter's share in a module: a (in, rank) and b (rank, out), float32."""

    a: mx.array
    b: mx.array
    scale: float
    weight: float


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination: Combination,
    base_model: str | None = None,
    advance: Advance = no_advance,
) -> Adapter:
    """One adapter from several, on the first one's base model.

    Args:
        adapters: from ``resolve_adapter``.
        weights: one per adapter; an adapter with a negative weight is subtracted.
        combination: how to combine them.
        base_model: treat them all as adapters of this model, whatever their configurations say.
        advance: called for each module.

    Returns:
        An adapter with float32 A and B, into which weights and scales are folded: every scale is 1.

    Raises:
        UserError: the base models differ (both are named), a module's shapes differ, its ranks
            differ but must be equal (all such modules are named), or a sum overflows.
    """
    _refuse_other_bases(adapters, base_model)
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.plan.modules))
    parts = {name: _parts(adapters, weights, name) for name in names}
    shapes = {name: _shapes(adapters, name) for name in names}
    if faults := [f"{n} has the shapes {_list(s)}" for n, s in shapes.items() if len(set(s)) > 1]:
        raise UserError(f"the adapters do not match: {'; '.join(faults)}")
    ranks = {name: [part.a.shape[1] for part in parts[name]] for name in names}
    unequal = [f"{name} has the ranks {_list(r)}" for name, r in ranks.items() if len(set(r)) > 1]
    if unequal and combination.type not in ANY_RANK:
        raise UserError(
            f"--combine {combination.type} needs equal ranks, but {'; '.join(unequal)}; use one of "
            f"{', '.join(ANY_RANK)}"
        )
    largest = max(module.rank for adapter in adapters for module in adapter.plan.modules.values())
    keys = mx.random.split(mx.random.key(combination.seed), len(names))
    tensors, modules = {}, {}
    for name, key in zip(names, keys, strict=True):
        advance()
        if not parts[name]:
            modules[name] = ModulePlan(0, 1.0, 0.0, *shapes[name][0])
            continue
        try:
            a, b = combine_module(parts[name], combination, largest, key)
            _check_finite(a, b)
        except ValueError as error:
            raise UserError(f"{name} cannot be combined with these weights: {error}") from None
        modules[name] = ModulePlan(a.shape[1], 1.0, 0.0, *shapes[name][0])
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    rank = max(module.rank for module in modules.values())
    made_from = [
        {
            "path": str(adapter.directory.resolve()) if adapter.directory else adapter.label,
            "weight": weight,
        }
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    first = adapters[0]
    return Adapter(
        RankPlan(rank, float(rank), modules),
        tensors,
        "combined",
        first.directory if len(adapters) == 1 else None,
        {"made_from": {"combine": combination.type, "adapters": made_from}},
        first.model,
        first.original,
        first.model_type,
    )


def combine_module(
    parts: Sequence[Part], combination: Combination, largest: int, key: mx.array
) -> tuple[mx.array, mx.array]:
    """A (in, rank) and B (rank, out) of one module, whose delta is (A B)ᵀ: scale 1.

    Args:
        parts: one for each adapter that has the module; at least one.
        combination: how to combine them.
        largest: the rank that ``svd`` truncates to if the combination names none.
        key: for DARE's random choice.

    Raises:
        ValueError: a sum is not finite.
    """
    kind, rank = combination.type, combination.svd_rank or largest
    if kind in ("cat", "svd"):
        a = mx.concatenate([part.a for part in parts], axis=1)
        b = mx.concatenate([part.weight * part.scale * part.b for part in parts])
        return (a, b) if kind == "cat" else _truncate(a, b, rank)
    if kind.endswith("_svd"):
        deltas = [part.scale * (part.a @ part.b) for part in parts]
        weights = [part.weight for part in parts]
        return _truncate_dense(_merge(deltas, weights, combination, key), rank)
    weights = [part.weight * part.scale for part in parts]
    roots = [math.sqrt(abs(weight)) for weight in weights]
    # The sign goes to A alone: on both sides it would cancel out.
    signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
    key_a, key_b = mx.random.split(key)
    a = _merge([part.a for part in parts], signed, combination, key_a)
    return a, _merge([part.b for part in parts], roots, combination, key_b)


def _merge(
    tensors: Sequence[mx.array],
    weights: Sequence[float],
    combination: Combination,
    key: mx.array,
) -> mx.array:
    """Merge tensors of one shape: prune them, then take their weighted sum or the majority."""
    kind, density = combination.type, combination.density
    if kind.startswith("ties"):
        tensors = [keep_largest(tensor, density) for tensor in tensors]
    elif kind.startswith("dare"):
        keys = mx.random.split(key, len(tensors))
        tensors = [keep_random(t, density, k) for t, k in zip(tensors, keys, strict=True)]
    mx.eval(tensors)
    weighted = [weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]
    if "ties" not in kind:
        return sum(weighted)
    # The vote ignores the weights, as in PEFT.
    votes = sum(map(mx.sign, tensors) if combination.majority_sign == "frequency" else tensors)
    majority = mx.where(votes >= 0, 1, -1)
    agrees = [mx.sign(tensor) == majority for tensor in tensors]
    kept = sum(value * agreed for value, agreed in zip(weighted, agrees, strict=True))
    return kept / mx.maximum(sum(agreed.astype(mx.float32) for agreed in agrees), 1)


def keep_largest(tensor: mx.array, density: float) -> mx.array:
    """The ⌊density · size⌋ entries of largest magnitude; zeros elsewhere."""
    number = int(density * tensor.size)
    if number == tensor.size:
        return tensor
    order = mx.argpartition(-mx.abs(tensor).reshape(-1), max(number - 1, 0))
    mask = mx.zeros(tensor.size)
    mask[order[:number]] = 1
    return tensor * mask.reshape(tensor.shape)


def keep_random(tensor: mx.array, density: float, key: mx.array) -> mx.array:
    """Each entry kept with probability ``density`` and then divided by it; zeros elsewhere."""
    if density == 1:
        return tensor
    return tensor * random_mask(tensor.shape, density, key) / density


def random_mask(shape: Sequence[int], density: float, key: mx.array) -> mx.array:
    """Entries that are True with probability ``density``."""
    return mx.random.bernoulli(density, shape, key=key)


def _truncate(a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """A·B truncated to its ``rank`` largest singular values; A's columns are orthonormal.

    With a QR of each factor, only a small matrix of their rank is decomposed.
    """
    _check_finite(a, b)
    q_a, r_a = linalg.qr(a)
    q_b, r_b = linalg.qr(b.T)
    u, s, vt = linalg.svd(r_a @ r_b.T)
    return q_a @ u[:, :rank], s[:rank, None] * (vt[:rank] @ q_b.T)


def _truncate_dense(delta: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """The same for a dense delta (in, out)."""
    _check_finite(delta)
    a = top_right_vectors(delta.T, min(rank, *delta.shape)).T
    return a, a.T @ delta


def _check_finite(*arrays: mx.array) -> None:
    if not all(mx.isfinite(array).all().item() for array in arrays):
        raise ValueError("entries are not finite")


def _shapes(adapters: Sequence[Adapter], name: str) -> list[tuple[int, int]]:
    """(out, in) of a module in each adapter that has it."""
    modules = [adapter.plan.modules[name] for adapter in adapters if name in adapter.plan.modules]
    return [(module.out_features, module.in_features) for module in modules]


def _parts(adapters: Sequence[Adapter], weights: Sequence[float], name: str) -> list[Part]:
    """A module's share in each adapter that adapts it."""
    return [
        Part(
            adapter.tensors[f"{name}.lora_a"].astype(mx.float32),
            adapter.tensors[f"{name}.lora_b"].astype(mx.float32),
            adapter.plan.modules[name].scale,
            weight,
        )
        for adapter, weight in zip(adapters, weights, strict=True)
        if name in adapter.plan.adapted()
    ]


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _refuse_other_bases(adapters: Sequence[Adapter], base_model: str | None) -> None:
    """Refuse different families and, unless ``base_model`` is given, different models."""
    first = adapters[0]
    for other in adapters[1:]:
        same_family = first.model_type == other.model_type
        if not same_family or (base_model is None and first.base != other.base):
            raise UserError(
                f"adapters of different base models cannot be combined: {first.label} is of "
                f"{first.base} ({first.model_type}), {other.label} of {other.base} "
                f"({other.model_type}); if both names mean the same model, pass it as --base-model"
            )
