"""GGUF files, through the package ``gguf`` that llama.cpp maintains: an optional dependency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from tlora_mlx.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

# By the name that users give: ggml's type of the matrices, and llama.cpp's of the whole file.
OUTTYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q5_1": ("Q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
# ggml's types that are floats.
GGML_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def gguf_package() -> ModuleType:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            "--format gguf needs the package gguf; install it with: pip install 'tlora-mlx[gguf]'"
        ) from None
    return gguf


def ggml_type(name: str, shape: tuple[int, ...], outtype: str) -> str:
    """ggml's type for a tensor of a model.

    Vectors and routers stay float32, and rows that are no multiple of 32 float16, as with
    llama.cpp's converter (``conversion/base.py``, ``prepare_tensors``). The embeddings and the
    output layer of a 4 or 5 bit file have 8 bits, since they matter most.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    type, _ = OUTTYPES[outtype]
    if type.startswith("Q") and shape[-1] % 32:
        return "F16"
    outer = name in ("token_embd.weight", "output.weight")
    return "Q8_0" if outer and type.startswith(("Q4", "Q5")) else type


def gguf_encode(values: np.ndarray, type: str) -> np.ndarray:
    """Rows (…, width) float32 as the file's bytes, (bytes,) uint8."""
    gguf = gguf_package()
    with np.errstate(over="ignore"):  # float16; reading back finds it
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[type])
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def gguf_decode(stored: np.ndarray, shape: tuple[int, ...], type: str) -> np.ndarray:
    """The inverse of ``gguf_encode``: rows of this shape, float32."""
    gguf = gguf_package()
    rows = stored.reshape(*shape[:-1], -1)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type]).reshape(shape)


def write_gguf_header(
    writer: GGUFWriter, tensors: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, int]:
    """Write everything but the tensors' data, into a file of the full size.

    Args:
        writer: with its metadata.
        tensors: shape and ggml's type by name.

    Returns:
        The offset of each tensor's data.
    """
    gguf = gguf_package()
    for name, (shape, type) in tensors.items():
        kind = gguf.GGMLQuantizationType[type]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(shape) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    offset, places = writer.ggml_pad(writer.path.stat().st_size, writer.data_alignment), {}
    for name, info in writer.tensors[0].items():
        places[name] = offset
        offset += writer.ggml_pad(info.nbytes, writer.data_alignment)
    with writer.path.open("rb+") as file:
        file.truncate(offset)
    return places
