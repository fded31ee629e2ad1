"""Merging a run into the quantized MLX model that it was trained on, quantized again."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import adapter_delta
from tlora_mlx.adapters.proof import Proof
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.errors import RunError
from tlora_mlx.merging.adjusting import Slopes, adjusted
from tlora_mlx.merging.bits import Choice, choose_bits, weight_groups
from tlora_mlx.merging.compensation import OutputErrors, round_module
from tlora_mlx.merging.conversion import StoredWeight, read_conversion
from tlora_mlx.merging.quantized_proof import QuantizedProof, part_bytes, prove_weight
from tlora_mlx.merging.rewriting import Rewriting
from tlora_mlx.models.weights import ModelWeights
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.storage.blocks import blocks
from tlora_mlx.storage.files import Finish, new_directory

if TYPE_CHECKING:  # it loads mlx-lm, which plain rounding does without
    from tlora_mlx.merging.task import AdaptedTask


def export_requantized(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    task: AdaptedTask | None = None,
    auto_bits: bool = False,
    target_bpw: float | None = None,
    observer: Observer = SILENT,
    finish: Finish | None = None,
) -> Proof:
    """Write the quantized model that a run was trained on with W + scale·B·A, quantized again.

    Unless bits are chosen, only the adapted weights change, and they keep the settings that they
    had. A change smaller than the quantization steps is lost where it is rounded to nearest, as
    mlx-lm does (``mx.quantize``). With a task, errors make up for each other where the task's loss
    depends on them, and the loss of what was written is measured.

    Args:
        adapter: an adapter, or the directory of a run.
        output: directory to create; must be new or empty.
        task: what has to be kept (``read_task``); None: round to nearest. The adapter is taken off
            its model. Experts, and weights that are not quantized, are rounded to nearest.
        auto_bits: choose each weight's bits by the task, which there must be.
        target_bpw: bits per weight of the whole model, at most; None: those that it has.
        observer: notified of each module.
        finish: called with the directory before it appears under its final name.

    Returns:
        The result of reading the export back: how much of the deltas, and of the task, survives.

    Raises:
        UserError: the run's model is incomplete, not quantized, does not fit the run or the target,
            or ``output`` exists.
        RunError: writing failed, or what was read back differs; nothing is left behind.
    """
    output = Path(output)
    adapter = resolve_adapter(adapter)
    base, weights = read_conversion(adapter, "--quantize")
    proof = QuantizedProof(output)
    with new_directory(output, finish) as staging:
        base.copy_other_files(staging)
        base.copy_index(staging)
        choice = Choice(weights)
        if task and auto_bits:
            choice = choose_bits(adapter, base, weights, task, target_bpw, observer)
            weights, proof.bits = choice.weights, choice.bits
        with ExitStack() as stack:
            out = Rewriting(base, weights, staging, stack)
            digests: dict[str, list[str]] = {}
            slopes: dict[str, Slopes] = {}
            if task:
                proof.outputs, digests, slopes = _compensate(
                    adapter, base, choice, task, out, observer
                )
            others = [weight for name, weight in weights.items() if name not in digests]
            with observer.stage("quantizing", len(others)) as advance:
                for weight in others:
                    _requantize(adapter, base, weight, out)
                    advance()
            if task:
                for name, parts in adjusted(task, weights, slopes, out.written).items():
                    digests[name] = out.write(weights[name], 0, part_bytes(parts))
            out.sync()
        out.write_settings(weights)
        with observer.stage("reading back", len(weights)) as advance:
            for weight in weights.values():
                prove_weight(adapter, base, weight, out.written, digests, proof)
                advance()
        out.prove_copies()
        if task:
            for weight in weights.values():
                task.place(weight, weight.read(out.written))
            proof.losses = task.losses()
            proof.survival().write(staging)
    return proof


def _compensate(
    adapter: Adapter,
    base: ModelWeights,
    choice: Choice,
    task: AdaptedTask,
    out: Rewriting,
    observer: Observer,
) -> tuple[dict[str, OutputErrors], dict[str, list[str]], dict[str, Slopes]]:
    """Write the weights that can be rounded so that the task's loss notices least.

    Returns:
        For each of them its parts' digests; if it is adapted, the errors of its outputs; and if it
        has scales and biases to move, the loss's slopes along them.
    """
    weights = {
        name: weight
        for name, weight in choice.weights.items()
        if weight.can_be_compensated and name not in choice.outside
    }
    errors, digests, slopes = {}, {}, {}
    for group in weight_groups(weights, task.memory):
        curvatures = dict(choice.curvatures) or task.curvatures(group)
        with observer.stage("rounding", len(group)) as advance:
            for name in group:
                advance()
                curvature = curvatures.pop(name)
                if not mx.any(curvature.outputs).item():
                    continue  # the loss does not depend on it on any sample: nearest will do
                weight = weights[name]
                parts = weight.before.read(base.file_of)
                dense = weight.before.dense(base.file_of, 0, weight.rows)
                delta = 0 * dense
                if weight.modules:
                    delta = adapter_delta(adapter, name).product()
                nearest = weight.nearest(dense + delta)
                grids = weight.before.grid(), weight.grid()
                try:
                    rounded = round_module(parts, nearest, delta, *grids, curvature)
                except ValueError as error:
                    raise RunError(f"rounding {name} failed: {error}") from None
                digests[name] = out.write(weight, 0, rounded.parts)
                if weight.modules:
                    errors[name] = rounded.outputs
                if rounded.slopes:
                    slopes[name] = rounded.slopes
    return errors, digests, slopes


def _requantize(adapter: Adapter, base: ModelWeights, weight: StoredWeight, out: Rewriting) -> None:
    """Write one weight's parts: W + Δ rounded to nearest, and the rows that do not change."""
    for first, last, name in weight.pieces():
        delta = adapter_delta(adapter, name) if name else None
        for i, j in blocks(last - first, weight.shape[-1]):
            start, stop = first + i, first + j
            if delta or weight.has_changed:
                values = weight.before.dense(base.file_of, start, stop)
                if delta:
                    values = values + delta.rows(i, j).product()
                parts = weight.nearest(values)
            else:
                parts = weight.read(base.file_of, start, stop)
            out.write(weight, start, part_bytes(parts))
