"""How many bits each weight gets: most where the loss minds its rounding most, within a size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import adapter_delta
from tlora_mlx.errors import UserError
from tlora_mlx.evaluation.survival import ChosenBits
from tlora_mlx.merging.compensation import COARSER_DAMPING
from tlora_mlx.merging.conversion import StoredWeight
from tlora_mlx.merging.refitting import weighted_error
from tlora_mlx.merging.regridding import made_finer, narrowed
from tlora_mlx.method.curvature import Curvature
from tlora_mlx.models.weights import ModelWeights
from tlora_mlx.observer import Observer
from tlora_mlx.storage.blocks import blocks
from tlora_mlx.storage.safetensors import tensor_size

if TYPE_CHECKING:  # it loads mlx-lm, which plain rounding does without
    from tlora_mlx.merging.task import AdaptedTask

# What mx.quantize's affine mode offers.
BITS = (2, 3, 4, 5, 6, 8)

# By a weight's name and its bits: how much its rounding raises the loss, summed over the tokens.
Costs = Mapping[str, Mapping[int, float]]


def weight_groups(weights: Mapping[str, StoredWeight], memory: int) -> Iterator[list[str]]:
    """The weights in groups whose curvatures fit into ``memory`` bytes, one at least in each."""
    group, taken = [], 0
    for name, weight in weights.items():
        rows, columns = weight.shape
        size = 4 * (rows**2 + columns**2 + rows * columns)
        if group and taken + size > memory:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += size
    if group:
        yield group


class Size:
    """A quantized model's size, by mlx-lm's measure (mlx_lm/utils.py, compute_bits_per_weight).

    Attributes:
        weights: the number of parameters, as if nothing was quantized.
        bits: what all tensors take.

    Args:
        base: the model.
        changed: weights that are stored otherwise than there.
    """

    def __init__(self, base: ModelWeights, changed: Mapping[str, StoredWeight]):
        self.bits = self.weights = 0
        for tensor, file in base.file_of.items():
            module, _, part = tensor.rpartition(".")
            layout = file.entries[tensor][:2]
            quantized = f"{module}.scales" in base.file_of
            weight = changed.get(module)
            if quantized and part == "weight":
                weight = weight or StoredWeight(base, module)
                self.weights += prod(weight.shape)
            elif not (quantized and part in ("scales", "biases")):
                self.weights += prod(layout[1])
            if weight:
                layout = weight.layout(tensor, file.entries[tensor])
            self.bits += 8 * tensor_size(*layout)

    @property
    def per_weight(self) -> float:
        """Bits per weight."""
        return self.bits / self.weights


class Choice(NamedTuple):
    """What is to be written.

    Attributes:
        weights: as they are to be stored, by name: the adapted ones, and those with other bits than
            before.
        outside: the names of those that are rounded to nearest: embeddings and output layers.
        curvatures: of the others, if those of all modules fit into memory; or none.
        bits: all modules' bits, if they were chosen.
    """

    weights: dict[str, StoredWeight]
    outside: Collection[str] = ()
    curvatures: Mapping[str, Curvature] = {}
    bits: ChosenBits | None = None


def choose_bits(
    adapter: Adapter,
    base: ModelWeights,
    adapted: Mapping[str, StoredWeight],
    task: AdaptedTask,
    target_bpw: float | None,
    observer: Observer,
) -> Choice:
    """Choose every weight's bits so that the task's loss rises least, at a size.

    Args:
        adapter: what is to be merged.
        base: the quantized model.
        adapted: its adapted weights by name.
        task: what has to be kept.
        target_bpw: the model's bits per weight, at most; None: those of ``base``.
        observer: notified of the progress.

    Raises:
        UserError: the model is not quantized in the affine mode, or cannot be that small.
        RunError: the loss is not finite.
    """
    stored = affine_weights(base)
    stored |= {name: weight for name, weight in adapted.items() if name in stored}
    inside, outside = task.roundable(stored)
    outside = [name for name in outside if not stored[name].modules]
    size = Size(base, {})
    limit = size.bits if target_bpw is None else target_bpw * size.weights
    lowest, next_to_lowest = (
        Size(base, {name: stored[name].at(bits) for name in (*inside, *outside)})
        for bits in BITS[:2]
    )
    if lowest.bits > limit:
        raise UserError(
            f"--target-bpw {target_bpw:g} is too small for {base.name}, which needs "
            f"{lowest.per_weight + 5e-3:.2f} at least"
        )
    # 2 bits cost more than the second order tells (docs/BENCHMARKS.md). So they are only for models
    # that are too large with 3 bits everywhere, and do not pay for more bits elsewhere.
    possible = BITS[1:] if next_to_lowest.bits <= limit else BITS[:2]
    costs, kept = {}, {}
    groups = list(weight_groups({name: stored[name] for name in inside}, task.memory))
    for group in groups:
        curvatures = task.curvatures(group)
        with observer.stage("weighing bits", len(group)) as advance:
            for name in group:
                advance()
                weight, curvature = stored[name], curvatures[name]
                if mx.any(curvature.outputs).item():
                    costs[name] = _by_curvature(adapter, base, weight, curvature, possible)
        if len(groups) == 1:
            kept = curvatures
    with observer.stage("weighing bits", len(outside)) as advance:
        for name in outside:
            costs[name] = _by_loss(base, stored[name], task, possible)
            advance()
    costs = {name: by_bits for name, by_bits in costs.items() if by_bits}
    chosen = allocate(costs, stored, limit - size.bits)
    after = {name: stored[name].at(bits) for name, bits in chosen.items()}
    changed = {n: w for n, w in after.items() if w.settings != stored[n].settings}
    weights = {name: after.get(name, weight) for name, weight in adapted.items()} | changed
    numbers = Counter(after.get(n, w).settings["bits"] for n, w in stored.items())
    modules = {str(bits): number for bits, number in sorted(numbers.items())}
    found = ChosenBits(modules, Size(base, weights).per_weight, size.per_weight)
    return Choice(weights, outside, kept, found)


def affine_weights(base: ModelWeights) -> dict[str, StoredWeight]:
    """A model's quantized weights by name.

    Raises:
        UserError: one is quantized in another mode, which has a fixed number of bits.
    """
    names = [part.removesuffix(".scales") for part in base.file_of if part.endswith(".scales")]
    stored = {name: StoredWeight(base, name) for name in names}
    for name, weight in stored.items():
        if (mode := weight.settings["mode"]) != "affine":
            raise UserError(
                f"--bits auto is for models in the affine mode, but {name} of {base.name} is "
                f"{mode}; leave it out"
            )
    return stored


def _by_curvature(
    adapter: Adapter,
    base: ModelWeights,
    weight: StoredWeight,
    curvature: Curvature,
    possible: Collection[int],
) -> dict[int, float]:
    """What each possible number of bits costs: half of tr(O·E·I·Eᵀ), for W + Δ rounded to nearest.

    Without Δ, more bits than W has make no difference.
    """
    grid = weight.grid()
    start = grid.take_apart(weight.read(base.file_of))
    target = start.dense()
    if weight.modules:
        target = target + adapter_delta(adapter, weight.name).product()
    inputs, outputs, unit = curvature.damped(COARSER_DAMPING)
    unit /= 2 * mx.diagonal(curvature.outputs).sum().item()
    importance = np.array(mx.diagonal(inputs))
    costs = {}
    for bits in possible:
        if bits <= grid.bits or weight.modules:
            onto = weight.at(bits).grid()
            found = (
                narrowed(target, onto, importance)
                if bits < grid.bits
                else made_finer(target, start, grid, onto)
            )
            costs[bits] = unit * weighted_error(found.dense() - target, inputs, outputs)
    return costs


def _by_loss(
    base: ModelWeights, weight: StoredWeight, task: AdaptedTask, possible: Collection[int]
) -> dict[int, float]:
    """The same for a weight without an adapter, by the loss with it alone rounded to nearest."""
    present = weight.settings["bits"]
    costs = {present: 0.0} if present in possible else {}
    for bits in possible:
        if bits < present:
            other = weight.at(bits)
            pieces = [
                other.nearest(weight.dense(base.file_of, start, stop))
                for start, stop in blocks(*weight.shape)
            ]
            task.place(other, [mx.concatenate(parts) for parts in zip(*pieces, strict=True)])
            costs[bits] = max(0.0, task.tokens * (task.calibration_loss() - task.adapted))
    task.place(weight, weight.read(base.file_of))
    return costs


def allocate(costs: Costs, weights: Mapping[str, StoredWeight], spare: float) -> dict[str, int]:
    """The bits at which costs add up to least, or nearly: always the step that saves most per bit.

    Steps are those between the corners of each weight's convex hull, so that nothing of the same
    size costs less, until a step does not fit any more; smaller ones may still.

    Args:
        costs: of the weights that may change; one of their bits is the present one.
        weights: as they are now.
        spare: how many bits the model may grow; negative if it has to shrink.
    """
    chosen, steps = {}, []
    for name, by_bits in costs.items():
        entries = prod(weights[name].shape)
        corner = chosen[name] = min(by_bits)
        spare += entries * (weights[name].settings["bits"] - corner)
        while gains := {
            (by_bits[corner] - by_bits[bits]) / (entries * (bits - corner)): bits
            for bits in by_bits
            if bits > corner and by_bits[bits] < by_bits[corner]
        }:
            steepest = max(gains)
            steps.append((steepest, name, corner, gains[steepest], entries))
            corner = gains[steepest]
    for _, name, corner, bits, entries in sorted(steps, key=lambda step: (-step[0], step[1:3])):
        if chosen[name] == corner and entries * (bits - corner) <= spare:
            chosen[name] = bits
            spare -= entries * (bits - corner)
    return chosen
