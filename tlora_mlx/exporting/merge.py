"""A run merged into its base model: W + scale·B·A in every weight, streamed from disk to disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tlora_mlx.errors import UserError
from tlora_mlx.exporting.checkpoint import (
    FLOATS,
    INDEX,
    STORED,
    Checkpoint,
    OpenFile,
    Scratch,
    copy_file,
    decode,
    encode,
    segments,
)
from tlora_mlx.exporting.delta import Delta, adapted, run_delta
from tlora_mlx.exporting.names import hf_weight, unexportable
from tlora_mlx.exporting.proof import Errors, Proof, blocks, compare_merged, wrong
from tlora_mlx.files import new_directory
from tlora_mlx.run_directory import Run
from tlora_mlx.tensor_file import TensorFile
from tlora_mlx.terminal import bar, say


def export_merged(run: Run, output: Path, base_model: str | None = None) -> Path:
    """Write a run's base model with W + scale·B·A in the adapted weights, as a checkpoint.

    The sum is taken in float32 and cast back. Files, tensor names, dtypes, order and index are the
    base model's; what is not adapted is copied as bytes. Memory does not grow with the model: each
    thread works on a few rows at a time.

    Args:
        run: what ``read_run`` read.
        output: directory to make; must not exist, or be empty.
        base_model: directory or Hub repository of the full-precision base; the run's own where it
            is None: the model it was trained on, or the original that a quantized conversion's
            card names.

    Returns:
        ``output``.

    Raises:
        UserError: the family or a module has no known Hugging Face name, the base model is not
            known, not whole, quantized or of other shapes, or ``output`` is taken.
        RunError: it could not be written, or not as it should be; nothing is left of it.
    """
    if reason := unexportable(run.config["model_type"], run.plan.modules):
        raise UserError(f"cannot export {run.path}: {reason}")
    base_model = base_model or run.config.get("base_model")
    if not base_model:
        raise UserError(
            f"the base model {run.config['model']} is quantized and its card names no original; "
            "name the full-precision model with --base-model, or merge into the quantized one's "
            "own weights with --dequantize"
        )
    base = Checkpoint(base_model)
    if {"quantization", "quantization_config"} & base.config.keys():
        raise UserError(
            f"model {base.name} is quantized; name the full-precision one with --base-model, or, "
            "if the run was trained on it, pass --dequantize"
        )
    targets = _targets(run, base)
    proof = Proof()
    with new_directory(output) as beside:
        base.copy_other_files(beside)
        if (base.path / INDEX).exists():
            copy_file(base.path / INDEX, beside / INDEX)
        with bar("merging", len(targets)) as advance:
            for name, file in base.files.items():
                _write(file, beside / name, run, targets, advance)
        with bar("reading back", len(targets)) as advance:
            for name, file in base.files.items():
                _prove(file, beside / name, run, targets, proof, advance)
        say(proof.summary())
    return output


class _Target(NamedTuple):
    """A module that is merged, and whether the checkpoint keeps its weight as (in, out)."""

    module: str
    transposed: bool

    def delta(self, run: Run) -> Delta:
        """Δ as the checkpoint keeps the weight."""
        delta = run_delta(run, self.module)
        return delta.transposed() if self.transposed else delta


def _targets(run: Run, base: Checkpoint) -> dict[str, _Target]:
    """What is merged by the name of its tensor in the checkpoint; all faults in one message."""
    targets, faults = {}, []
    for name, module in adapted(run).items():
        weight = hf_weight(run.config["model_type"], name)
        tensor = weight.tensor
        if tensor is None:
            faults.append(
                f"{name} is a part of a tensor of all experts, which cannot be merged yet"
            )
            continue
        targets[tensor] = target = _Target(name, weight.transposed)
        if tensor not in base.home:
            faults.append(f"it has no {tensor}")
            continue
        entry, shape = base.home[tensor].entries[tensor], (module.out_features, module.in_features)
        shape = shape[::-1] if target.transposed else shape
        if entry.shape != shape:
            faults.append(f"{tensor} has shape {entry.shape}, the run was trained on {shape}")
        elif entry.dtype not in FLOATS:
            faults.append(f"{tensor} has dtype {entry.dtype}, not {', '.join(FLOATS)}")
    if faults:
        raise UserError(
            f"run {run.path} cannot be merged into model {base.name}: {'; '.join(faults)}"
        )
    return targets


class _Block(NamedTuple):
    """Some rows of a weight and what is added to them, or some bytes that stay as they are.

    Attributes:
        tensor: the weight's name; None for bytes.
        offset: of the first byte in the file.
        shape: (rows, in), or (bytes,).
        dtype: the weight's, as the format calls it; U8 for bytes.
        delta: Δ of these rows.
    """

    tensor: str | None
    offset: int
    shape: tuple[int, ...]
    dtype: str
    delta: Delta | None


def _segments(file: TensorFile, run: Run, targets: Mapping[str, _Target]) -> Iterator[list[_Block]]:
    """The blocks of a whole file in its order: those of one weight, or of what is between two."""
    for tensor, start, stop in segments(file, targets.keys()):
        if tensor is None:
            yield [
                _Block(None, start + i, (j - i,), "U8", None) for i, j in blocks(stop - start, 1)
            ]
            continue
        entry, delta = file.entries[tensor], targets[tensor].delta(run)
        row = np.dtype(STORED[entry.dtype]).itemsize * entry.shape[1]
        yield [
            _Block(
                tensor,
                start + i * row,
                (j - i, entry.shape[1]),
                entry.dtype,
                delta.rows(i, j),
            )
            for i, j in blocks(*entry.shape)
        ]


def _write(
    file: TensorFile,
    target: Path,
    run: Run,
    targets: Mapping[str, _Target],
    advance: Callable[[int], None],
) -> None:
    """Write one weight file of the merged model."""
    # The pool is the first to be left: its threads are done before the files close.
    with OpenFile(file.path) as source, OpenFile(target, file.size) as out, _pool() as pool:
        work = partial(_write_block, source, out, Scratch())
        for segment in _segments(file, run, targets):
            for _ in pool.map(work, segment):
                pass
            advance(int(segment[0].tensor is not None))
        out.sync()


def _prove(
    file: TensorFile,
    target: Path,
    run: Run,
    targets: Mapping[str, _Target],
    proof: Proof,
    advance: Callable[[int], None],
) -> None:
    """Read one weight file of the merged model back, and the base model's anew."""
    written = TensorFile(target, "what was written")
    if written.entries != file.entries:
        raise wrong(f"the header of {target.name}")
    with OpenFile(file.path) as source, OpenFile(target) as out, _pool() as pool:
        work = partial(_prove_block, source, out, Scratch())
        for segment in _segments(file, run, targets):
            for errors in pool.map(work, segment):
                if tensor := segment[0].tensor:
                    proof.add(targets[tensor].module, errors)
            advance(int(segment[0].tensor is not None))


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _write_block(source: OpenFile, out: OpenFile, scratch: Scratch, block: _Block) -> None:
    stored = source.read(block.offset, scratch.array("source", block.shape, STORED[block.dtype]))
    if block.delta:
        weight = decode(stored, scratch.array("weight", block.shape, np.float32))
        weight += block.delta.product(scratch.array("delta", block.shape, np.float32))
        with np.errstate(over="ignore"):  # float16; reading back finds it
            encode(weight, stored, scratch)
    out.write(block.offset, stored)


def _prove_block(source: OpenFile, out: OpenFile, scratch: Scratch, block: _Block) -> Errors:
    """Hold a block of the written file against W + Δ, formed anew.

    Raises:
        RunError: it is off by more than rounding, or not finite; or bytes are not the same.
    """
    dtype = STORED[block.dtype]
    before = source.read(block.offset, scratch.array("source", block.shape, dtype))
    after = out.read(block.offset, scratch.array("written", block.shape, dtype))
    if not block.delta:
        if not np.array_equal(before, after):
            raise wrong("what is not adapted")
        return Errors()
    weight = decode(before, scratch.array("weight", block.shape, np.float32))
    merged = decode(after, scratch.array("merged", block.shape, np.float32))
    delta = block.delta.product(scratch.array("delta", block.shape, np.float32))
    return compare_merged(block.tensor, weight, merged, delta, FLOATS[block.dtype])
