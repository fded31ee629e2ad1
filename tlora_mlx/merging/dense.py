"""Merging a run into its base model: W + scale·B·A in every weight, streamed disk to disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import Delta, adapter_delta
from tlora_mlx.adapters.proof import Errors, Proof, compare_merged, mismatch_error
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.errors import UserError
from tlora_mlx.models.model_directory import is_quantized
from tlora_mlx.models.names import HFWeight, hf_weight
from tlora_mlx.models.weights import ModelWeights
from tlora_mlx.observer import SILENT, Advance, Observer
from tlora_mlx.storage.blocks import OpenFile, Scratch, blocks, decode, encode, segments
from tlora_mlx.storage.files import Finish, new_directory, sync
from tlora_mlx.storage.safetensors import DTYPES, FLOATS, TensorFile


def export_merged(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    base_model: str | None = None,
    observer: Observer = SILENT,
    finish: Finish | None = None,
) -> Proof:
    """Write a checkpoint of a run's base model, with W + scale·B·A in the adapted weights.

    The sum is computed in float32 and cast back. Files, tensor names, dtypes, order and index are
    the base model's; unadapted tensors are copied byte for byte. Memory use does not grow with the
    model: each thread works on a few rows at a time.

    Args:
        adapter: an adapter, or the directory of a run, a PEFT adapter or an mlx-lm adapter.
        output: directory to create; must be new or empty.
        base_model: directory or Hub repository of the full-precision base; None: the run's own,
            which is the model that it was trained on, or the original that a quantized model's
            card names.
        observer: notified of each module.
        finish: called with the directory before it appears under its final name.

    Returns:
        The result of reading the export back and comparing its deltas.

    Raises:
        UserError: the family or a module has no known Hugging Face name, the base model is
            unknown, incomplete, quantized or of other shapes, or ``output`` exists.
        RunError: writing failed, or what was read back differs; nothing is left behind.
    """
    output = Path(output)
    adapter = resolve_adapter(adapter, base_model)
    base_model = adapter.base_on_hugging_face(
        base_model,
        "name the full-precision model with --base-model, or merge into the quantized one's own "
        "weights with --dequantize",
    )
    base = ModelWeights(base_model)
    if is_quantized(base.config):
        raise UserError(
            f"model {base.name} is quantized; name the full-precision one with --base-model, or, "
            "if the run was trained on it, pass --dequantize"
        )
    count, targets = len(adapter.adapted()), merge_targets(adapter, base)
    proof = Proof(output)
    with new_directory(output, finish) as staging, ThreadPoolExecutor(1) as waiting:
        base.copy_other_files(staging)
        base.copy_index(staging)
        synced = []  # the disk is awaited while the processors work on
        with observer.stage("merging", count) as advance:
            for name, file in base.files.items():
                _write(file, staging / name, adapter, targets, advance)
                synced.append(waiting.submit(sync, staging / name))
        with observer.stage("reading back", count) as advance:
            for name, file in base.files.items():
                _prove(file, staging / name, adapter, targets, proof, advance)
        for file in synced:
            file.result()
    return proof


class _Change(NamedTuple):
    """What is added to some rows of a weight.

    Attributes:
        module: the module that Δ belongs to.
        columns: the columns that Δ is added to.
        delta: Δ, transposed if the checkpoint stores the weight that way.
    """

    module: str
    columns: slice
    delta: Delta

    def rows(self, start: int, stop: int) -> _Change:
        """The change restricted to some of the rows."""
        return self._replace(delta=self.delta.rows(start, stop))


# For each tensor of the checkpoint, the modules that are merged into it, and their places in it.
MergeTargets = Mapping[str, Mapping[str, HFWeight]]


def merge_targets(adapter: Adapter, base: ModelWeights) -> MergeTargets:
    """What to merge, by the name of the checkpoint's tensor; all faults in one message."""
    targets: dict[str, dict[str, HFWeight]] = {}
    experts: dict[str, int] = {}
    for name, module in adapter.plan.modules.items():
        weight = hf_weight(adapter.model_type, name)
        if weight.stacked:
            experts[weight.tensor] = max(experts.get(weight.tensor, 0), weight.number + 1)
        if module.rank:
            targets.setdefault(weight.tensor, {})[name] = weight
    faults = []
    for tensor, modules in targets.items():
        if tensor not in base.file_of:
            faults.append(f"it has no {tensor}")
            continue
        name, weight = next(iter(modules.items()))
        module, entry = adapter.plan.modules[name], base.file_of[tensor].entries[tensor]
        parts = 2 if weight.stacked and weight.rows else 1
        shape = (parts * module.out_features, module.in_features)
        shape = shape[::-1] if weight.transposed else shape
        shape = (experts[tensor], *shape) if weight.stacked else shape
        if entry.shape != shape:
            faults.append(f"{tensor} has shape {entry.shape}, but the run was trained on {shape}")
        elif entry.dtype not in FLOATS:
            faults.append(f"{tensor} has dtype {entry.dtype}, not {', '.join(FLOATS)}")
    if faults:
        raise UserError(
            f"run {adapter.label} cannot be merged into model {base.name}: {'; '.join(faults)}"
        )
    return targets


def _pieces(
    adapter: Adapter, modules: Mapping[str, HFWeight], shape: tuple[int, ...]
) -> Iterator[tuple[int, int, list[_Change]]]:
    """Ranges of a tensor's rows, in order, with the changes to each: the modules' Δ.

    A stack of experts, (experts, rows, columns), is treated as one matrix of all their rows. If it
    is transposed, gate and up are columns of the same rows.
    """
    places: dict[tuple[int, int], list[tuple[str, slice]]] = {}
    for name, weight in modules.items():
        rows, columns = slice(0, shape[-2]), slice(None)
        if weight.stacked and weight.rows:
            if weight.transposed:
                columns = weight.rows.slice(shape[-1])
            else:
                rows = weight.rows.slice(shape[-2])
        first = weight.number * shape[-2] if weight.stacked else 0
        place = first + rows.start, first + rows.stop
        places.setdefault(place, []).append((name, columns))
    for (start, stop), parts in sorted(places.items()):
        changes = []
        for name, columns in parts:
            delta = adapter_delta(adapter, name)
            delta = delta.transposed() if modules[name].transposed else delta
            changes.append(_Change(name, columns, delta))
        yield start, stop, changes


class _Block(NamedTuple):
    """Some rows of a weight and the changes to them, or some bytes that stay unchanged.

    Attributes:
        tensor: the weight's name; None for bytes.
        offset: the position of the first byte in the file.
        shape: (rows, columns), or (bytes,).
        dtype: the file format's code for the weight; U8 for bytes.
        changes: what is added to these rows.
    """

    tensor: str | None
    offset: int
    shape: tuple[int, ...]
    dtype: str
    changes: list[_Change]


def _segments(file: TensorFile, adapter: Adapter, targets: MergeTargets) -> Iterator[list[_Block]]:
    """The blocks of a whole file, in order: those of some rows, or of the bytes in between."""
    for tensor, start, stop in segments(file, targets.keys()):
        if tensor is not None:
            entry = file.entries[tensor]
            width = entry.shape[-1]
            row = np.dtype(DTYPES[entry.dtype].bits).itemsize * width
            first = start
            for begin, end, changes in _pieces(adapter, targets[tensor], entry.shape):
                yield _bytes(start, first + begin * row)
                yield [
                    _Block(
                        tensor,
                        first + (begin + i) * row,
                        (j - i, width),
                        entry.dtype,
                        [change.rows(i, j) for change in changes],
                    )
                    for i, j in blocks(end - begin, width)
                ]
                start = first + end * row
        yield _bytes(start, stop)


def _bytes(start: int, stop: int) -> list[_Block]:
    """The blocks of bytes from ``start`` to ``stop``; empty if there are none."""
    return [_Block(None, start + i, (j - i,), "U8", []) for i, j in blocks(stop - start, 1)]


def _merged(segment: list[_Block]) -> int:
    """How many modules are merged in a segment."""
    return len(segment[0].changes) if segment else 0


def _write(
    file: TensorFile, target: Path, adapter: Adapter, targets: MergeTargets, advance: Advance
) -> None:
    """Write one weight file of the merged model."""
    # The pool is closed first: its threads finish before the files close.
    with OpenFile(file.path) as source, OpenFile(target, file.size) as out, _pool() as pool:
        work = partial(_write_block, source, out, Scratch())
        for segment in _segments(file, adapter, targets):
            for _ in pool.map(work, segment):
                pass
            advance(_merged(segment))


def _prove(
    file: TensorFile,
    target: Path,
    adapter: Adapter,
    targets: MergeTargets,
    proof: Proof,
    advance: Advance,
) -> None:
    """Read one weight file of the merged model back, and compare it with the base model's."""
    written = TensorFile(target, "what was written")
    if written.entries != file.entries:
        raise mismatch_error(f"the header of {target.name}")
    with OpenFile(file.path) as source, OpenFile(target) as out, _pool() as pool:
        work = partial(_prove_block, source, out, Scratch())
        for segment in _segments(file, adapter, targets):
            for found in pool.map(work, segment):
                for change, errors in zip(segment[0].changes, found, strict=True):
                    proof.add(change.module, errors)
            advance(_merged(segment))


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _write_block(source: OpenFile, out: OpenFile, scratch: Scratch, block: _Block) -> None:
    stored = source.read(
        block.offset, scratch.array("source", block.shape, DTYPES[block.dtype].bits)
    )
    if block.changes:
        weight = decode(stored, scratch.array("weight", block.shape, np.float32))
        for change in block.changes:
            part = weight[:, change.columns]
            part += change.delta.product(scratch.array("delta", part.shape, np.float32))
        with np.errstate(over="ignore"):  # float16; reading back finds it
            encode(weight, stored, scratch)
    out.write(block.offset, stored)


def _prove_block(source: OpenFile, out: OpenFile, scratch: Scratch, block: _Block) -> list[Errors]:
    """Compare a block of the written file with W + Δ, recomputed; returns each change's errors.

    Raises:
        RunError: it is off by more than rounding, not finite, or unadapted bytes changed.
    """
    dtype = DTYPES[block.dtype].bits
    before = source.read(block.offset, scratch.array("source", block.shape, dtype))
    after = out.read(block.offset, scratch.array("written", block.shape, dtype))
    errors = []
    if block.changes:
        weight = decode(before, scratch.array("weight", block.shape, np.float32))
        merged = decode(after, scratch.array("merged", block.shape, np.float32))
    for change in block.changes:
        parts = weight[:, change.columns], merged[:, change.columns]
        delta = change.delta.product(scratch.array("delta", parts[0].shape, np.float32))
        errors.append(compare_merged(block.tensor, *parts, delta, FLOATS[block.dtype]))
    if all(change.columns != slice(None) for change in block.changes):  # as for bytes
        for change in block.changes:
            before[:, change.columns] = after[:, change.columns]
        if not np.array_equal(before.view(np.uint8), after.view(np.uint8)):
            raise mismatch_error("the unadapted bytes")
    return errors
