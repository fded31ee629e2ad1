"""Merging a run into the quantized MLX model that it was trained on, quantized again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import adapter_delta
from tlora_mlx.adapters.proof import Errors, Proof, mismatch_error
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.errors import UserError
from tlora_mlx.merging.conversion import StoredWeight, read_conversion
from tlora_mlx.models.weights import ModelWeights
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.storage.blocks import OpenFile, blocks, segments
from tlora_mlx.storage.files import Finish, copy_file, new_directory
from tlora_mlx.storage.safetensors import TensorFile


def export_requantized(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    observer: Observer = SILENT,
    finish: Finish | None = None,
) -> Proof:
    """Write the quantized model that a run was trained on with W + scale·B·A, quantized again.

    Only the adapted weights change; they are quantized as mlx-lm does (``mx.quantize``), with the
    settings that they had. A change smaller than the quantization steps is lost, so the share of
    the deltas that survives is measured on the written files and reported.

    Args:
        adapter: an adapter, or the directory of a run.
        output: directory to create; must be new or empty.
        observer: notified of each module.
        finish: called with the directory before it appears under its final name.

    Returns:
        The result of reading the export back: how much of the deltas survives.

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
        with observer.stage("quantizing", len(weights)) as advance, ExitStack() as stack:
            out = {n: stack.enter_context(OpenFile(staging / n, patch=True)) for n in base.files}
            for weight in weights.values():
                _requantize(adapter, base, weight, out)
                advance()
            for file in out.values():
                file.sync()
        written = {name: TensorFile(staging / name, "what was written") for name in base.files}
        with observer.stage("reading back", len(weights)) as advance:
            for weight in weights.values():
                in_files = {part: written[base.file_of[part].path.name] for part in weight.parts}
                _prove_requantized(adapter, base, weight, in_files, proof)
                advance()
        touched = {part for weight in weights.values() for part in weight.parts}
        for name, file in base.files.items():
            _prove_copies(file, written[name], touched)
    return proof


class QuantizedProof(Proof):
    """What reading back a requantized model has shown."""

    def summary(self) -> str:
        """One line for the user: how much of the deltas survives."""
        least = self.worst(lambda errors: -errors.surviving)
        return (
            f"verified {len(self.modules)} modules, quantized again: "
            f"{self.total.surviving:.1%} of the delta survives overall, "
            f"{self.modules[least].surviving:.1%} in {least}; relative error "
            f"{self.total.relative:.2g} (--dequantize keeps the whole delta)"
        )


def _requantize(
    adapter: Adapter, base: ModelWeights, weight: StoredWeight, out: Mapping[str, OpenFile]
) -> None:
    """Overwrite one weight's parts in the copy."""
    for name, (first, last) in weight.modules.items():
        delta = adapter_delta(adapter, name)
        for i, j in blocks(last - first, weight.shape[-1]):
            start, stop = first + i, first + j
            values = weight.dense(base.file_of, start, stop) + delta.rows(i, j).product()
            for part, data in zip(weight.parts, weight.stored(values), strict=True):
                file = base.file_of[part]
                place = file.entries[part].start + start * data.shape[1]
                out[file.path.name].write(place, data)


def _prove_requantized(
    adapter: Adapter,
    base: ModelWeights,
    weight: StoredWeight,
    written: Mapping[str, TensorFile],
    proof: Proof,
) -> None:
    """Compare one weight's parts with W + Δ quantized again, and measure what survives of Δ.

    Experts without an adapter are compared with the base model, bit for bit.
    """

    def stored(files: Mapping[str, TensorFile], start: int, stop: int) -> list[np.ndarray]:
        parts = (files[part].rows(part, start, stop) for part in weight.parts)
        return [np.array(part.view(mx.uint8)) for part in parts]

    for first, last, name in weight.pieces():
        factors = adapter_delta(adapter, name) if name else None
        for i, j in blocks(last - first, weight.shape[-1]):
            start, stop = first + i, first + j
            found = stored(written, start, stop)
            if factors:
                before, delta = (
                    weight.dense(base.file_of, start, stop),
                    factors.rows(i, j).product(),
                )
                expected = weight.stored(before + delta)
            else:
                expected = stored(base.file_of, start, stop)
            if not all(map(np.array_equal, found, expected)):
                raise mismatch_error(name or "the unadapted bytes")
            if factors:
                after = weight.dense(written, start, stop)
                if not np.isfinite(after).all():
                    raise UserError(f"{name} with its delta is not finite once quantized")
                proof.add(name, Errors.of(after - before - delta, delta))


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
