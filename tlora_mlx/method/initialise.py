"""A for every adapted module: task subspaces from covariances, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.covariance import accumulate, groups_within
from tlora_mlx.method.distributed import is_first, tensors_from_first
from tlora_mlx.method.layers import Linear, dense_weight, linear_shape
from tlora_mlx.method.subspace import captured_energy, krylov_subspace, task_subspace

# Where each product costs a pass: wider blocks, at most so many passes, and a captured energy that
# has converged when a pass raises it by less than this share.
STREAMING_OVERSAMPLING = 32
STREAMING_PASSES = 12
STREAMING_TOLERANCE = 5e-5


def exact_subspaces(
    plan: RankPlan,
    targets: Mapping[str, Linear],
    leaders: Mapping[str, str],
    covariances: Mapping[str, mx.array],
    done: Callable[[], None] = lambda: None,
    energies: dict[str, float] | None = None,
) -> dict[str, mx.array]:
    """A (rank, in) of every adapted module whose input's covariance is at hand.

    Args:
        plan: the ranks.
        targets: the target modules, by full name.
        leaders: for each target the module whose covariance it shares.
        covariances: C (in, in) by leader; others' modules are passed over.
        done: called after each module.
        energies: where given, the modules' captured energies are put into it.

    Raises:
        ValueError: W·C of a module is not finite (it is named).
    """
    subspaces = {}
    for name, module in plan.adapted().items():
        if leaders[name] in covariances:
            weight, covariance = dense_weight(targets[name]), covariances[leaders[name]]
            try:
                a = subspaces[name] = task_subspace(weight, covariance, module.rank)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if energies is not None:
                energies[name] = captured_energy(weight, covariance, a)
            done()
    return subspaces


def grouped_subspaces(
    model: nn.Module,
    plan: RankPlan,
    targets: Mapping[str, Linear],
    leaders: Mapping[str, str],
    batches: Sequence[Batch],
    memory: int,
    on_batch: Callable[[int], None] = lambda samples: None,
    energies: dict[str, float] | None = None,
) -> dict[str, mx.array]:
    """``exact_subspaces`` of all modules, with a pass over the samples per group of covariances.

    A group is as many inputs as have covariances that fit into ``memory`` bytes together.
    """
    subspaces = {}
    for group in groups_within(targets, (leaders[name] for name in plan.adapted()), memory):
        linears = {name: targets[name] for name in group}
        covariances = accumulate(model, linears, batches, lambda _, x: x.T @ x, on_batch)
        subspaces |= exact_subspaces(plan, targets, leaders, covariances, energies=energies)
    return subspaces


def streamed_subspaces(
    model: nn.Module,
    plan: RankPlan,
    targets: Mapping[str, Linear],
    leaders: Mapping[str, str],
    batches: Sequence[Batch],
    seed: int,
    on_batch: Callable[[int], None] = lambda samples: None,
) -> dict[str, mx.array]:
    """A (rank, in) of every adapted module without any covariance being formed.

    Since C P = Σ Xᵀ(X P), a pass over the samples answers the Krylov steps of all modules at once.
    A module whose captured energy has converged drops out; the last one ends the passes. Under
    ``mlx.launch`` the first process alone takes the steps, since others may round otherwise, and
    the result is there.
    """
    steps = {
        name: krylov_subspace(
            partial(dense_weight, targets[name]),
            linear_shape(targets[name]),
            module.rank,
            STREAMING_OVERSAMPLING,
            STREAMING_PASSES,
            STREAMING_TOLERANCE,
            seed,
        )
        for name, module in plan.adapted().items()
        if is_first()
    }
    subspaces: dict[str, mx.array] = {}
    blocks = tensors_from_first({name: next(step) for name, step in steps.items()})
    while blocks:
        readers: dict[str, list[str]] = {}
        for name in blocks:
            readers.setdefault(leaders[name], []).append(name)
        side_by_side = {
            leader: mx.concatenate([blocks[name] for name in names], axis=1)
            for leader, names in readers.items()
        }
        linears = {leader: targets[leader] for leader in targets if leader in readers}
        products = accumulate(model, linears, batches, partial(_product, side_by_side), on_batch)
        for leader, names in readers.items() if is_first() else ():
            widths = [blocks[name].shape[1] for name in names]
            edges = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
            for name, part in zip(names, mx.split(products[leader], edges, axis=1), strict=True):
                try:
                    blocks[name] = steps[name].send(part)
                except StopIteration as end:
                    subspaces[name], _ = end.value
                    del blocks[name]
        blocks = tensors_from_first(blocks)
    return {name: subspaces[name] for name in plan.adapted() if name in subspaces}


def _product(blocks: Mapping[str, mx.array], name: str, x: mx.array) -> mx.array:
    """One sample's part of C P: Xᵀ(X P), of centred X (T, in) and P (in, k)."""
    return x.T @ (x @ blocks[name])


def streamed_bytes(plan: RankPlan) -> int:
    """What ``streamed_subspaces`` keeps: P, C P, the basis and its image of every module."""
    return sum(
        4 * (m.rank + STREAMING_OVERSAMPLING) * (3 * m.in_features + m.out_features)
        for m in plan.adapted().values()
    )
