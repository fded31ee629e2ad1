"""GGUF adapters: what llama.cpp loads with ``--lora``.

A module's scale in llama.cpp is ``adapter.lora.alpha`` over its own rank (ggml-org/llama.cpp,
``src/llama-adapter.h``, ``get_scale``), so ranks stay exact: alpha is 1, and scale · rank is folded
into B. Tensors are ``NAME.lora_a`` (rank, in) and ``NAME.lora_b`` (out, rank) with llama.cpp's name
of the weight, and with its order of rows; experts are stacked, padded to their stack's largest rank
(``convert_lora_to_gguf.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import Delta, adapter_delta
from tlora_mlx.adapters.proof import Proof, cast_finite, mismatch_error, prove_adapter
from tlora_mlx.models.llama_cpp import LlamaCppModel, Place
from tlora_mlx.models.model_directory import find_model
from tlora_mlx.storage.files import Finish, new_directory
from tlora_mlx.storage.gguf_file import gguf_package

ADAPTER = "adapter.gguf"


def write_gguf_adapter(
    adapter: Adapter,
    output: Path,
    dtype: str = "float32",
    base_model: str | None = None,
    *,
    finish: Finish | None = None,
) -> Proof:
    """Write ``adapter.gguf`` into a new directory, and read it back.

    Args:
        adapter: the adapter, bound to a model.
        output: directory to create; must be new or empty.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.
        base_model: the model that the file names as its base; None: the adapter's own.
        finish: adds to the directory before it appears under its final name.

    Raises:
        UserError: the family cannot be written as GGUF, a value overflows ``dtype``, ``output``
            exists, or the package ``gguf`` is missing.
        RunError: writing failed, or what was read back differs; nothing is left behind.
    """
    gguf = gguf_package()
    _, path = find_model(adapter.model, ["config.json"])
    model = LlamaCppModel(adapter.model_type, path)
    adapter.adapted()
    model.check_modules(adapter.plan.modules, adapter.label)
    places = {name: model.place_of_module(name) for name in adapter.plan.modules}
    tensors = cast_finite(_tensors(adapter, places), dtype)
    with new_directory(output, finish) as staging:
        writer = gguf.GGUFWriter(staging / ADAPTER, model.family.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
        if base := base_model or adapter.base:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, Path(base).name)
        for name, tensor in tensors.items():
            if tensor.dtype == mx.bfloat16:
                data = np.array(tensor.view(mx.uint8))
                writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, np.array(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return _prove(adapter, places, staging / ADAPTER, dtype, output)


def _tensors(adapter: Adapter, places: Mapping[str, Place]) -> dict[str, mx.array]:
    """The file's tensors, float32."""
    single: dict[str, mx.array] = {}
    stacks: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for name, place in places.items():
        module, delta = adapter.plan.modules[name], adapter_delta(adapter, name)
        if delta is not None:
            delta = Delta(place.rows(delta.b), delta.a)
        if place.expert is not None:
            nothing = Delta(
                np.zeros((module.out_features, 0), np.float32),
                np.zeros((0, module.in_features), np.float32),
            )
            stacks.setdefault(place.name, {})[place.expert] = delta or nothing
        elif delta is not None:
            single[f"{place.name}.lora_a"] = mx.array(delta.a)
            single[f"{place.name}.lora_b"] = mx.array(delta.b * np.float32(len(delta.a)))
    for name, experts in stacks.items():
        if rank := max(len(delta.a) for delta in experts.values()):
            padded = [(experts[i], rank - len(experts[i].a)) for i in range(len(experts))]
            a = np.stack([np.pad(delta.a, [(0, rest), (0, 0)]) for delta, rest in padded])
            b = np.stack([np.pad(delta.b, [(0, 0), (0, rest)]) for delta, rest in padded])
            single[f"{name}.lora_a"] = mx.array(a)
            single[f"{name}.lora_b"] = mx.array(b * np.float32(rank))
    return single


def _prove(
    adapter: Adapter, places: Mapping[str, Place], path: Path, dtype: str, output: Path
) -> Proof:
    """Read the file back as llama.cpp does: alpha / rank · B A."""
    gguf = gguf_package()
    reader = gguf.GGUFReader(path)
    alpha = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    expected = {f"{place.name}.lora_{part}" for place in places.values() for part in "ab"}
    if tensors.keys() - expected:
        raise mismatch_error(f"the header of {path.name}")

    def matrix(name: str, expert: int | None) -> np.ndarray:
        tensor = tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape([int(size) for size in reversed(tensor.shape)])
        return values if expert is None else values[expert]

    def delta(name: str) -> Delta | None:
        place = places[name]
        if f"{place.name}.lora_a" not in tensors:
            return None
        a, b = (matrix(f"{place.name}.lora_{part}", place.expert) for part in "ab")
        return Delta(place.rows_back(b) * np.float32(alpha / len(a)), a)

    return prove_adapter(adapter, delta, dtype, output)
