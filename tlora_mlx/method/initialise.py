"""A for every adapted module: calibrate, allocate, find task subspaces within a memory budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from rich.filesize import decimal

from tlora_mlx.distributed.collectives import is_first, tensors_from_first
from tlora_mlx.method.allocation import RankPlan, plan_ranks
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.calibration import Calibration, calibrate
from tlora_mlx.method.covariance import (
    accumulate,
    exact_bytes,
    groups_within,
    input_leaders,
    is_streamed,
)
from tlora_mlx.method.energy import CapturedEnergy, captured_energy
from tlora_mlx.method.experts import Expert
from tlora_mlx.method.layers import Linear, dense_weight, linear_shape
from tlora_mlx.method.subspace import krylov_subspace, task_subspace
from tlora_mlx.observer import SILENT, Advance, Observer, no_advance

# With streaming, each product costs a pass: blocks are wider, passes are limited, and the captured
# energy has converged once a pass raises it by less than this share.
STREAMING_OVERSAMPLING = 32
STREAMING_PASSES = 12
STREAMING_TOLERANCE = 5e-5


@dataclass(frozen=True)
class Budget:
    """The settings for allocating ranks and scales.

    Attributes:
        rank: the base rank; the budget is this times the number of target modules.
        alpha: the base alpha.
        max_rank: no module gets more; None: only min(out, in) is the limit.
    """

    rank: int
    alpha: float
    max_rank: int | None = None


@dataclass(frozen=True)
class Subspaces:
    """The modules' initial A, and how much of W·C each captures.

    Attributes:
        a: A (rank, in), float32 with orthonormal rows, by full module name.
        energies: the captured energies; empty with streaming, which forms no covariance.
    """

    a: dict[str, mx.array]
    energies: dict[str, CapturedEnergy]

    def update(self, more: Subspaces) -> None:
        """Add other modules' subspaces."""
        self.a.update(more.a)
        self.energies.update(more.energies)


@dataclass(frozen=True)
class Initialisation:
    """What training starts from.

    Attributes:
        plan: ranks and scales.
        a: ``NAME.lora_a`` (in, rank) of every adapted module.
        energies: as in ``Subspaces``.
    """

    plan: RankPlan
    a: dict[str, mx.array]
    energies: dict[str, CapturedEnergy]


def calibrate_and_plan(
    model: nn.Module,
    targets: Mapping[str, Linear],
    batches: Sequence[Batch],
    budget: Budget,
    covariance_of: Collection[str] = (),
    observer: Observer = SILENT,
) -> tuple[Calibration, RankPlan]:
    """Run the calibration samples through the model and allocate ranks and scales.

    Args:
        model: the base model; it is frozen on return.
        targets: the target modules, by full name.
        batches: the calibration samples; under ``mlx.launch``, this process's share of them.
        budget: what the ranks are allocated by.
        covariance_of: as for ``calibrate``.
        observer: is notified of each batch.

    Raises:
        NotImplementedError: a target module does not get its inputs sample by sample.
        ValueError: the base model's loss or gradients are not finite on a sample.
    """
    samples = sum(batch.tokens.shape[0] for batch in batches)
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    try:
        with observer.stage("calibrating", samples) as advance:
            calibration = calibrate(model, targets, batches, covariance_of, advance)
        plan = plan_ranks(
            calibration.sensitivities, shapes, budget.rank, budget.alpha, budget.max_rank
        )
    except ValueError as error:
        raise ValueError(f"the calibration failed: {error}") from None
    return calibration, plan


def initialise(
    model: nn.Module,
    targets: Mapping[str, Linear],
    batches: Sequence[Batch],
    budget: Budget,
    *,
    plan: RankPlan | None = None,
    covariance: str = "auto",
    memory: int,
    seed: int = 0,
    observer: Observer = SILENT,
) -> Initialisation:
    """Calibrate, allocate, and find A of every adapted module.

    Args:
        model: the base model; it is frozen on return.
        targets: the target modules, by full name; with a plan, those in the plan.
        batches: the calibration samples; under ``mlx.launch``, this process's share of them.
        budget: what the ranks are allocated by; not used with a plan.
        plan: given ranks and scales; then nothing is calibrated.
        covariance: ``exact`` keeps covariances (in × in), in as many passes over the samples as
            ``memory`` requires; ``streaming`` keeps a few vectors (in × (rank + 32)) per module;
            ``auto`` is exact if one pass is enough.
        memory: bytes that covariances may take.
        seed: of the streaming method's random blocks.
        observer: is notified of the plan, how covariances are formed, and each batch.

    Raises:
        NotImplementedError: a target module does not get its inputs sample by sample.
        ValueError: a statistic is not finite, or a module's W·C is not (the module is named).
    """
    leaders = input_leaders(model, targets)
    groups = groups_within(targets, leaders.values(), memory)
    streaming = is_streamed(covariance, groups)
    covariances: dict[str, mx.array] = {}
    if plan is None:
        # Experts' covariances need separate passes, in which each expert's rows are known.
        wanted = () if streaming else [n for n in groups[0] if not isinstance(targets[n], Expert)]
        calibration, plan = calibrate_and_plan(model, targets, batches, budget, wanted, observer)
        covariances = calibration.covariances
    observer.planned(plan)
    if streaming:
        expected, how = streamed_bytes(plan), "streaming"
    else:
        expected = max(exact_bytes(targets, group) for group in groups)
        how = f"exact, {len(groups)} pass{'es' * (len(groups) > 1)}"
    observer.note(f"covariance: {how}, about {decimal(expected)} ({decimal(memory)} allowed)")
    try:
        found = exact_subspaces(plan, targets, leaders, covariances)
        covariances.clear()
        left = {n: m for n, m in plan.modules.items() if m.rank and n not in found.a}
        rest = replace(plan, modules=left)
        with observer.stage("task subspaces", 0) as advance:
            common = (model, rest, targets, leaders, batches)
            if streaming:
                found.a.update(streamed_subspaces(*common, seed, advance))
            elif left:
                found.update(grouped_subspaces(*common, memory, advance))
    except ValueError as error:
        raise ValueError(f"the task subspace failed: {error}") from None
    tensors = tensors_from_first({f"{name}.lora_a": a.T for name, a in found.a.items()})
    return Initialisation(plan, tensors, found.energies)


def exact_subspaces(
    plan: RankPlan,
    targets: Mapping[str, Linear],
    leaders: Mapping[str, str],
    covariances: Mapping[str, mx.array],
) -> Subspaces:
    """A (rank, in) of every adapted module whose input's covariance is given.

    Args:
        plan: the ranks.
        targets: the target modules, by full name.
        leaders: for each target the module whose covariance it shares.
        covariances: C (in, in) by leader; modules without one are skipped.

    Raises:
        ValueError: a module's W·C is not finite (the module is named).
    """
    subspaces, energies = {}, {}
    for name, module in plan.adapted().items():
        if leaders[name] in covariances:
            weight, covariance = dense_weight(targets[name]), covariances[leaders[name]]
            try:
                a = subspaces[name] = task_subspace(weight, covariance, module.rank)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            energies[name] = captured_energy(weight, covariance, a)
    return Subspaces(subspaces, energies)


def grouped_subspaces(
    model: nn.Module,
    plan: RankPlan,
    targets: Mapping[str, Linear],
    leaders: Mapping[str, str],
    batches: Sequence[Batch],
    memory: int,
    advance: Advance = no_advance,
) -> Subspaces:
    """``exact_subspaces`` of all modules, with a pass over the samples per group of covariances.

    A group is as many covariances as fit into ``memory`` bytes together.
    """
    found = Subspaces({}, {})
    for group in groups_within(targets, (leaders[name] for name in plan.adapted()), memory):
        linears = {name: targets[name] for name in group}
        covariances = accumulate(model, linears, batches, lambda _, x: x.T @ x, advance)
        found.update(exact_subspaces(plan, targets, leaders, covariances))
    return found


def streamed_subspaces(
    model: nn.Module,
    plan: RankPlan,
    targets: Mapping[str, Linear],
    leaders: Mapping[str, str],
    batches: Sequence[Batch],
    seed: int,
    advance: Advance = no_advance,
) -> dict[str, mx.array]:
    """A (rank, in) of every adapted module, without forming any covariance.

    Since C P = Σ Xᵀ(X P), a pass over the samples answers the Krylov steps of all modules at once.
    A module whose captured energy has converged drops out; the passes end with the last module.
    Under ``mlx.launch`` only the first process takes the steps and returns subspaces, since others
    may round differently.
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
        products = accumulate(model, linears, batches, partial(_product, side_by_side), advance)
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
    """These samples' part of C P: Xᵀ(X P), of centred X (N, in) and P (in, k)."""
    return x.T @ (x @ blocks[name])


def streamed_bytes(plan: RankPlan) -> int:
    """The memory of ``streamed_subspaces``: P, C P, the basis and its image of every module."""
    return sum(
        4 * (m.rank + STREAMING_OVERSAMPLING) * (3 * m.in_features + m.out_features)
        for m in plan.adapted().values()
    )
