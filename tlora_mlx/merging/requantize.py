"""Merging a run into the quantized MLX model that it was trained on, quantized again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import adapter_delta
from tlora_mlx.adapters.proof import Errors, Proof, mismatch_error
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.errors import RunError, UserError, counted
from tlora_mlx.evaluation.survival import Survival, TaskLosses
from tlora_mlx.merging.adjusting import Slopes, adjusted
from tlora_mlx.merging.compensation import OutputErrors, round_module
from tlora_mlx.merging.conversion import StoredWeight, read_conversion
from tlora_mlx.models.weights import ModelWeights
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.storage.blocks import OpenFile, blocks, segments
from tlora_mlx.storage.files import Finish, copy_file, new_directory
from tlora_mlx.storage.safetensors import TensorFile

if TYPE_CHECKING:  # it loads mlx-lm, which plain rounding does without
    from tlora_mlx.merging.task import AdaptedTask


def export_requantized(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    task: AdaptedTask | None = None,
    observer: Observer = SILENT,
    finish: Finish | None = None,
) -> Proof:
    """Write the quantized model that a run was trained on with W + scale·B·A, quantized again.

    Only the adapted weights change; they keep the settings that they had. A change smaller than
    the quantization steps is lost where it is rounded to nearest, as mlx-lm does
    (``mx.quantize``). With a task, errors make up for each other where the task's loss depends on
    them, and the loss of what was written is measured.

    Args:
        adapter: an adapter, or the directory of a run.
        output: directory to create; must be new or empty.
        task: what has to be kept (``read_task``); None: round to nearest. The adapter is taken off
            its model. Experts, and weights that are not quantized, are rounded to nearest.
        observer: notified of each module.
        finish: called with the directory before it appears under its final name.

    Returns:
        The result of reading the export back: how much of the deltas, and of the task, survives.

    Raises:
        UserError: the run's model is incomplete, not quantized, does not fit the run, or ``output``
            exists.
        RunError: writing failed, or what was read back differs; nothing is left behind.
    """
    output = Path(output)
    adapter = resolve_adapter(adapter)
    base, weights = read_conversion(adapter, "--quantize")
    proof = QuantizedProof(output)
    with new_directory(output, finish) as staging:
        base.copy_other_files(staging)
        base.copy_index(staging)
        for name, file in base.files.items():
            copy_file(file.path, staging / name)
        with ExitStack() as stack:
            out = {n: stack.enter_context(OpenFile(staging / n, patch=True)) for n in base.files}
            digests: dict[str, list[str]] = {}
            slopes: dict[str, Slopes] = {}
            if task:
                by_task = {n: w for n, w in weights.items() if w.can_be_compensated}
                proof.outputs, digests, slopes = _compensate(
                    adapter, base, by_task, task, out, observer
                )
            others = [weight for name, weight in weights.items() if name not in digests]
            with observer.stage("quantizing", len(others)) as advance:
                for weight in others:
                    _requantize(adapter, base, weight, out)
                    advance()
            written = {name: TensorFile(staging / name, "what was written") for name in base.files}
            in_files = {part: written[file.path.name] for part, file in base.file_of.items()}
            if task:
                for name, parts in adjusted(task, weights, slopes, in_files).items():
                    digests[name] = _overwrite(base, weights[name], 0, _bytes(parts), out)
            for file in out.values():
                file.sync()
        with observer.stage("reading back", len(weights)) as advance:
            for weight in weights.values():
                _prove_requantized(adapter, base, weight, in_files, digests, proof)
                advance()
        touched = {part for weight in weights.values() for part in weight.parts}
        for name, file in base.files.items():
            _prove_copies(file, written[name], touched)
        if task:
            for weight in weights.values():
                task.place(weight, weight.read(in_files))
            proof.losses = task.losses()
            proof.survival().write(staging)
    return proof


class QuantizedProof(Proof):
    """What reading back a requantized model has shown.

    Attributes:
        outputs: for each module that was rounded by the task, the error of its outputs and what Δ
            changes in them, each squared, summed, and weighted by what the loss depends on.
        losses: the task's losses; None without a task.
    """

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.outputs: dict[str, OutputErrors] = {}
        self.losses: TaskLosses | None = None

    def summary(self) -> str:
        """One line for the user: how much of the deltas or, with a task, of its effect survives."""
        verified = f"verified {len(self.modules)} modules, quantized again: "
        if self.losses:
            return f"{verified}{self.losses.summary()}{self._outputs()} (--dequantize keeps it all)"
        least = self.worst(lambda errors: -errors.surviving)
        return (
            f"{verified}{self.total.surviving:.1%} of the delta survives overall, "
            f"{self.modules[least].surviving:.1%} in {least}; relative error "
            f"{self.total.relative:.2g} (--dequantize keeps the whole delta)"
        )

    def _outputs(self) -> str:
        """How far the outputs are off, and how many modules could not be rounded by the task."""
        plain = len(self.modules.keys() - self.outputs.keys())
        others = (
            f"; {counted(plain, 'module')} rounded to nearest (expert, not quantized, or without "
            "effect on the loss)"
            if plain
            else ""
        )
        if not self.outputs:
            return others
        worst = max(self.outputs, key=lambda name: self.outputs[name].relative)
        overall = sum(self.outputs.values(), OutputErrors(0.0, 0.0)).relative
        return (
            f"; relative error of the outputs {overall:.2g} overall, "
            f"{self.outputs[worst].relative:.2g} in {worst}{others}"
        )

    def survival(self) -> Survival:
        """What ``survival.json`` holds; the losses must have been measured."""
        errors = {name: found.relative for name, found in self.outputs.items()}
        return Survival(self.losses, errors, sorted(self.modules.keys() - errors.keys()))


def _groups(weights: Mapping[str, StoredWeight], memory: int) -> Iterator[list[str]]:
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


def _compensate(
    adapter: Adapter,
    base: ModelWeights,
    weights: Mapping[str, StoredWeight],
    task: AdaptedTask,
    out: Mapping[str, OpenFile],
    observer: Observer,
) -> tuple[dict[str, OutputErrors], dict[str, list[str]], dict[str, Slopes]]:
    """Overwrite some weights' parts in the copy, rounded so that the task's loss notices least.

    Returns:
        For each of them the errors of its outputs, its parts' digests and, if it has scales and
        biases to move, the loss's slopes along them.
    """
    errors, digests, slopes = {}, {}, {}
    for group in _groups(weights, task.memory):
        curvatures = task.curvatures(group)
        with observer.stage("rounding", len(group)) as advance:
            for name in group:
                advance()
                curvature = curvatures.pop(name)
                if not mx.any(curvature.outputs).item():
                    continue  # the loss does not depend on it on any sample: nearest will do
                weight, delta = weights[name], adapter_delta(adapter, name).product()
                parts = weight.read(base.file_of)
                dense = weight.dense(base.file_of, 0, weight.rows)
                nearest = weight.nearest(dense + delta)
                try:
                    rounded = round_module(parts, nearest, delta, weight.grid(), curvature)
                except ValueError as error:
                    raise RunError(f"rounding {name} failed: {error}") from None
                digests[name] = _overwrite(base, weight, 0, rounded.parts, out)
                errors[name] = rounded.outputs
                if rounded.slopes:
                    slopes[name] = rounded.slopes
    return errors, digests, slopes


def _requantize(
    adapter: Adapter, base: ModelWeights, weight: StoredWeight, out: Mapping[str, OpenFile]
) -> None:
    """Overwrite one weight's parts in the copy, rounded to nearest."""
    for name, (first, last) in weight.modules.items():
        delta = adapter_delta(adapter, name)
        for i, j in blocks(last - first, weight.shape[-1]):
            start, stop = first + i, first + j
            values = weight.dense(base.file_of, start, stop) + delta.rows(i, j).product()
            _overwrite(base, weight, start, _bytes(weight.nearest(values)), out)


def _overwrite(
    base: ModelWeights,
    weight: StoredWeight,
    start: int,
    parts: Sequence[np.ndarray],
    out: Mapping[str, OpenFile],
) -> list[str]:
    """Write some rows of a weight's parts, from row ``start`` on; returns the parts' digests."""
    for part, data in zip(weight.parts, parts, strict=True):
        file = base.file_of[part]
        place = file.entries[part].start + start * data.shape[1]
        out[file.path.name].write(place, np.ascontiguousarray(data))
    return [sha256(data).hexdigest() for data in parts]


def _bytes(parts: Sequence[mx.array]) -> list[np.ndarray]:
    return [np.array(part.view(mx.uint8)) for part in parts]


def _prove_requantized(
    adapter: Adapter,
    base: ModelWeights,
    weight: StoredWeight,
    written: Mapping[str, TensorFile],
    digests: Mapping[str, list[str]],
    proof: Proof,
) -> None:
    """Compare one weight's parts with what should be there, and measure what survives of Δ.

    That is what was rounded by the task, by its digests, or W + Δ rounded to nearest. Experts
    without an adapter are compared with the base model, bit for bit.
    """

    def stored(files: Mapping[str, TensorFile], start: int, stop: int) -> list[np.ndarray]:
        return _bytes(weight.read(files, start, stop))

    for first, last, name in weight.pieces():
        factors = adapter_delta(adapter, name) if name else None
        expected_digests = digests.get(name)
        found_digests = [sha256() for _ in weight.parts]
        for i, j in blocks(last - first, weight.shape[-1]):
            start, stop = first + i, first + j
            found = stored(written, start, stop)
            for digest, data in zip(found_digests, found, strict=True):
                digest.update(data)
            if factors:
                before, delta = (
                    weight.dense(base.file_of, start, stop),
                    factors.rows(i, j).product(),
                )
                expected = _bytes(weight.nearest(before + delta))
            else:
                expected = stored(base.file_of, start, stop)
            if not expected_digests and not all(map(np.array_equal, found, expected)):
                raise mismatch_error(name or "the unadapted bytes")
            if factors:
                after = weight.dense(written, start, stop)
                if not np.isfinite(after).all():
                    raise UserError(f"{name} with its delta is not finite once quantized")
                proof.add(name, Errors.of(after - before - delta, delta))
        if expected_digests and expected_digests != [d.hexdigest() for d in found_digests]:
            raise mismatch_error(name)


def _prove_copies(file: TensorFile, written: TensorFile, touched: set[str]) -> None:
    """Compare the unadapted tensors with the base model's, byte for byte."""
    if written.entries != file.entries:
        raise mismatch_error(f"the header of {file.path.name}")
    with OpenFile(file.path) as source, OpenFile(written.path) as out:
        for tensor, first, last in segments(file, touched):
            if tensor is None:
                for start, stop in blocks(last - first, 1):
                    before, after = np.empty((2, stop - start), np.uint8)
                    source.read(first + start, before)
                    if not np.array_equal(before, out.read(first + start, after)):
                        raise mismatch_error("the unadapted bytes")
