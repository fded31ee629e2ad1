"""A safetensors file whose tensors are read one at a time, when they are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tlora_mlx.errors import UserError
from tlora_mlx.files import check_safetensors

if TYPE_CHECKING:
    import mlx.core as mx

# MLX's dtypes by the codes of huggingface/safetensors (tensor.rs, Dtype).
MLX_DTYPES = {
    "BOOL": "bool_",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
}


class StoredTensor(NamedTuple):
    """Where a tensor lies in its file.

    Attributes:
        dtype: the format's code, such as ``BF16``.
        start: offset of its first byte in the file.
        stop: offset after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile(Mapping[str, "mx.array"]):
    """The tensors of a safetensors file by name; each access reads one anew and keeps nothing.

    Attributes:
        path: the file.
        entries: where each tensor lies, in the order of the file.
        metadata: the header's ``__metadata__``.
        size: of the file, in bytes.

    Args:
        path: the file.
        what: the beginning of the sentence where it is not right.

    Raises:
        UserError: it is missing, cut short, or its header is not right: not JSON, of absurd size,
            with tensors that overlap, leave gaps or do not have their shape's size (the safetensors
            package's own checks).
    """

    def __init__(self, path: Path, what: str):
        check_safetensors(path, what)
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        entries = {
            name: StoredTensor(
                entry["dtype"],
                tuple(entry["shape"]),
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        }
        self.entries = dict(sorted(entries.items(), key=lambda item: item[1].start))
        self.size = max((entry.stop for entry in entries.values()), default=8 + length)

    def __getitem__(self, name: str) -> mx.array:
        import mlx.core as mx

        entry = self.entries[name]
        if not math.prod(entry.shape):
            return mx.zeros(entry.shape, self._dtype(name))
        return self._read(name, entry.start, entry.stop).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Some rows of a tensor as a matrix, (stop - start, last dimension)."""
        entry = self.entries[name]
        width = entry.shape[-1]
        row = (entry.stop - entry.start) // math.prod(entry.shape[:-1])
        values = self._read(name, entry.start + start * row, entry.start + stop * row)
        return values.reshape(stop - start, width)

    def _read(self, name: str, start: int, stop: int) -> mx.array:
        import mlx.core as mx

        stored = np.fromfile(self.path, np.uint8, count=stop - start, offset=start)
        return mx.array(stored).view(self._dtype(name))

    def _dtype(self, name: str) -> mx.Dtype:
        import mlx.core as mx

        code = self.entries[name].dtype
        if code not in MLX_DTYPES:
            raise UserError(f"{name} in {self.path} has dtype {code}, which MLX has not")
        return getattr(mx, MLX_DTYPES[code])

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # a Mapping's own reads the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
