"""A run merged into the quantized MLX model that it was trained on, which is quantized again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import numpy as np

from tlora_mlx.errors import UserError
from tlora_mlx.exporting.checkpoint import INDEX, Checkpoint, OpenFile, copy_file, segments
from tlora_mlx.exporting.conversion import StoredWeight, read_conversion
from tlora_mlx.exporting.delta import run_delta
from tlora_mlx.exporting.proof import Errors, Proof, blocks, wrong
from tlora_mlx.files import new_directory
from tlora_mlx.run_directory import Run
from tlora_mlx.tensor_file import TensorFile
from tlora_mlx.terminal import bar, say


def export_requantized(run: Run, output: Path) -> Path:
    """Write the quantized model that a run was trained on with W + scale·B·A, quantized again.

    Only the adapted weights change, by mlx-lm's own quantization (``mx.quantize``) with the
    settings that they have; a change below the quantization's steps is lost, so how much of the
    deltas survives is measured on the written files, and said.

    Args:
        run: what ``read_run`` read.
        output: directory to make; must not exist, or be empty.

    Returns:
        ``output``.

    Raises:
        UserError: the run's model is not whole, not quantized, does not fit the run, or ``output``
            is taken.
        RunError: it could not be written, or not as it should be; nothing is left of it.
    """
    base, weights = read_conversion(run, "--quantize")
    proof = Proof()
    with new_directory(output) as beside:
        base.copy_other_files(beside)
        if (base.path / INDEX).exists():
            copy_file(base.path / INDEX, beside / INDEX)
        for name, file in base.files.items():
            copy_file(file.path, beside / name)
        with bar("quantizing", len(weights)) as advance, ExitStack() as stack:
            out = {n: stack.enter_context(OpenFile(beside / n, patch=True)) for n in base.files}
            for weight in weights.values():
                _requantize(run, base, weight, out)
                advance()
            for file in out.values():
                file.sync()
        written = {name: TensorFile(beside / name, "what was written") for name in base.files}
        with bar("reading back", len(weights)) as advance:
            for weight in weights.values():
                home = {part: written[base.home[part].path.name] for part in weight.parts}
                _prove_requantized(run, base, weight, home, proof)
                advance()
        touched = {part for weight in weights.values() for part in weight.parts}
        for name, file in base.files.items():
            _prove_copies(file, written[name], touched)
        least = proof.worst(lambda errors: -errors.surviving)
        say(
            f"read back {len(proof.modules)} modules, quantized again: "
            f"{proof.total.surviving:.1%} of the delta survives overall, "
            f"{proof.modules[least].surviving:.1%} in {least}; the error is "
            f"{proof.total.relative:.2g} of the delta (--dequantize keeps all of it)"
        )
    return output


def _requantize(
    run: Run, base: Checkpoint, weight: StoredWeight, out: Mapping[str, OpenFile]
) -> None:
    """Write one weight's parts over those of the copy."""
    for name, (first, last) in weight.modules.items():
        delta = run_delta(run, name)
        for i, j in blocks(last - first, weight.shape[-1]):
            start, stop = first + i, first + j
            values = weight.dense(base.home, start, stop) + delta.rows(i, j).product()
            for part, data in zip(weight.parts, weight.stored(values), strict=True):
                file = base.home[part]
                place = file.entries[part].start + start * data.shape[1]
                out[file.path.name].write(place, data)


def _prove_requantized(
    run: Run,
    base: Checkpoint,
    weight: StoredWeight,
    written: Mapping[str, TensorFile],
    proof: Proof,
) -> None:
    """Hold one weight's parts against W + Δ quantized anew, and what they are worth against Δ.

    Experts without an adapter are held against the base model's bits.
    """

    def stored(files: Mapping[str, TensorFile], start: int, stop: int) -> list[np.ndarray]:
        parts = (files[part].rows(part, start, stop) for part in weight.parts)
        return [np.array(part.view(mx.uint8)) for part in parts]

    for first, last, name in weight.pieces():
        factors = run_delta(run, name) if name else None
        for i, j in blocks(last - first, weight.shape[-1]):
            start, stop = first + i, first + j
            found = stored(written, start, stop)
            if factors:
                before, delta = weight.dense(base.home, start, stop), factors.rows(i, j).product()
                expected = weight.stored(before + delta)
            else:
                expected = stored(base.home, start, stop)
            if not all(map(np.array_equal, found, expected)):
                raise wrong(name or "what is not adapted")
            if factors:
                after = weight.dense(written, start, stop)
                if not np.isfinite(after).all():
                    raise UserError(f"{name} with its delta is not finite when it is quantized")
                proof.add(name, Errors.of(after - before - delta, delta))


def _prove_copies(file: TensorFile, written: TensorFile, touched: set[str]) -> None:
    """Hold whatever is not adapted against the base model's, byte by byte."""
    if written.entries != file.entries:
        raise wrong(f"the header of {file.path.name}")
    with OpenFile(file.path) as source, OpenFile(written.path) as out:
        for tensor, first, last in segments(file, touched):
            if tensor is None:
                for start, stop in blocks(last - first, 1):
                    before, after = np.empty((2, stop - start), np.uint8)
                    source.read(first + start, before)
                    if not np.array_equal(before, out.read(first + start, after)):
                        raise wrong("what is not adapted")
