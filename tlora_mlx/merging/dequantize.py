"""Merging a run into the quantized MLX model that it was trained on, written dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import Delta, adapter_delta, float32
from tlora_mlx.adapters.proof import Proof, compare_merged, mismatch_error
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.merging.conversion import StoredWeight, read_conversion
from tlora_mlx.models.model_directory import INDEX
from tlora_mlx.models.weights import ModelWeights, write_model_config
from tlora_mlx.observer import SILENT, Advance, Observer
from tlora_mlx.storage.blocks import OpenFile, Scratch, blocks, encode, same_bytes, tensor_bytes
from tlora_mlx.storage.files import Finish, new_directory, write_json
from tlora_mlx.storage.safetensors import DTYPES, FLOATS, TensorFile, tensor_size, tensors_header

# The largest file of a sharded model, in bytes; the same as mlx-lm's (mlx_lm/utils.py).
MAX_FILE = 5 << 30


class _Tensor(NamedTuple):
    """A tensor to write.

    Attributes:
        dtype: the file format's code.
        weight: the weight whose dense form this is; None if the tensor is copied.
    """

    dtype: str
    shape: tuple[int, ...]
    weight: StoredWeight | None


def export_dequantized(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    observer: Observer = SILENT,
    finish: Finish | None = None,
) -> Proof:
    """Write the quantized model that a run was trained on as a dense one, W + scale·B·A.

    The weights are what the run was trained on, in the dtype that the model computes in: nothing is
    lost but rounding. Tensor names are the quantized model's, which mlx-lm reads; transformers
    reads them if its own are the same.

    Args:
        adapter: an adapter, or the directory of a run.
        output: directory to create; must be new or empty.
        observer: notified of each tensor.
        finish: called with the directory before it appears under its final name.

    Returns:
        The result of reading the export back and comparing its deltas.

    Raises:
        UserError: the run's model is incomplete, not quantized, does not fit the run, or ``output``
            exists.
        RunError: writing failed, or what was read back differs; nothing is left behind.
    """
    output = Path(output)
    adapter = resolve_adapter(adapter)
    base, adapted = read_conversion(adapter, "--dequantize")
    tensors = _tensors(base, adapted)
    files = _files(tensors)
    metadata = next(iter(base.files.values())).metadata
    proof = Proof(output)
    with new_directory(output, finish) as staging:
        base.copy_other_files(staging)
        write_model_config(staging, _without_quantization(base.shared_config))
        if len(files) > 1:
            places = {tensor: file for file, names in files.items() for tensor in names}
            size = sum(_bytes(tensor) for tensor in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            write_json(staging / INDEX, index)
        with observer.stage("dequantizing", len(tensors)) as advance:
            for file, names in files.items():
                part = {name: tensors[name] for name in names}
                _write(adapter, base, part, staging / file, metadata, advance)
        with observer.stage("reading back", len(tensors)) as advance:
            for file, names in files.items():
                part = {name: tensors[name] for name in names}
                _prove(adapter, base, part, staging / file, proof, advance)
    return proof


def _tensors(base: ModelWeights, adapted: Mapping[str, StoredWeight]) -> dict[str, _Tensor]:
    """The tensors to write, by name, in the order of the files."""
    tensors = {}
    for name, file in base.file_of.items():
        module, _, part = name.rpartition(".")
        quantized = f"{module}.scales" in base.file_of and f"{module}.weight" in base.file_of
        if quantized and part in ("scales", "biases"):
            continue
        weight = adapted.get(module) if part == "weight" else None
        if quantized and part == "weight" and weight is None:
            weight = StoredWeight(base, module)
        entry = file.entries[name]
        tensors[name] = (
            _Tensor(weight.dtype, weight.shape, weight)
            if weight
            else _Tensor(entry.dtype, entry.shape, None)
        )
    return tensors


def _files(tensors: Mapping[str, _Tensor]) -> dict[str, list[str]]:
    """The tensors' names by file, each file up to ``MAX_FILE`` or one tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + _bytes(tensor) > MAX_FILE:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(tensor)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
        for i, names in enumerate(groups, 1)
    }


def _bytes(tensor: _Tensor) -> int:
    return tensor_size(tensor.dtype, tensor.shape)


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    dropped = ("quantization", "quantization_config")
    config = {key: value for key, value in config.items() if key not in dropped}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _without_quantization(config["text_config"])
    return config


def _write(
    adapter: Adapter,
    base: ModelWeights,
    tensors: Mapping[str, _Tensor],
    path: Path,
    metadata: Mapping[str, str],
    advance: Advance,
) -> None:
    """Write one weight file."""
    header, starts = tensors_header({n: (t.dtype, t.shape) for n, t in tensors.items()}, metadata)
    scratch, size = Scratch(), len(header) + sum(map(_bytes, tensors.values()))
    with OpenFile(path, size) as out:
        out.write(0, np.frombuffer(header, np.uint8))
        for name, place in starts.items():
            if weight := tensors[name].weight:
                for start, stop, _, delta in _changes(adapter, weight):
                    values = weight.dense(base.file_of, start, stop)
                    if delta:
                        values += delta.product()
                    stored = np.empty(values.shape, DTYPES[weight.dtype].bits)
                    with np.errstate(over="ignore"):  # float16; reading back finds it
                        encode(values, stored, scratch)
                    out.write(place + start * weight.shape[-1] * stored.itemsize, stored)
            else:
                for start, data in tensor_bytes(base.file_of[name], name):
                    out.write(place + start, data)
            advance()
        out.sync()


def _changes(
    adapter: Adapter, weight: StoredWeight
) -> Iterator[tuple[int, int, str | None, Delta | None]]:
    """All rows of a weight in blocks: (start, stop, the module that owns them, its Δ there)."""
    for first, last, module in weight.pieces():
        delta = adapter_delta(adapter, module) if module else None
        for start, stop in blocks(last - first, weight.shape[-1]):
            yield first + start, first + stop, module, delta and delta.rows(start, stop)


def _prove(
    adapter: Adapter,
    base: ModelWeights,
    tensors: Mapping[str, _Tensor],
    path: Path,
    proof: Proof,
    advance: Advance,
) -> None:
    """Read one weight file back, and compare it with the quantized model."""
    written = TensorFile(path, "what was written")
    if written.keys() != tensors.keys():
        raise mismatch_error(f"the header of {path.name}")
    for name, tensor in tensors.items():
        if weight := tensor.weight:
            for start, stop, module, delta in _changes(adapter, weight):
                before = weight.dense(base.file_of, start, stop)
                after = float32(written.rows(name, start, stop))
                added = delta.product() if delta else np.zeros_like(before)
                dtype = FLOATS[weight.dtype]
                errors = compare_merged(weight.name, before, after, added, dtype)
                if delta:
                    proof.add(module, errors)
        elif not same_bytes(base.file_of[name], written, name):
            raise mismatch_error(name)
        advance()
