"""The safetensors format: one table of dtypes, one header parser and one header writer.

The safetensors package checks every file that is read. This module adds what that package does not
offer: a tensor's offsets in its file, reading only some of its rows, and writing MLX's bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from tlora_mlx.errors import UserError, first_line
from tlora_mlx.storage.files import replace_file
from tlora_mlx.storage.foreign import open_file

if TYPE_CHECKING:
    import mlx.core as mx


class Dtype(NamedTuple):
    """A dtype of the format.

    Attributes:
        size: bytes per entry.
        name: MLX's name; None if MLX does not support it.
        bits: numpy's type with the same bits, for the dtypes that are processed in numpy.
    """

    size: int
    name: str | None
    bits: type | None = None


# The codes are those of huggingface/safetensors (safetensors/src/tensor.rs, Dtype).
DTYPES = {
    "F64": Dtype(8, None),
    "I64": Dtype(8, "int64"),
    "U64": Dtype(8, "uint64"),
    "F32": Dtype(4, "float32", np.float32),
    "I32": Dtype(4, "int32"),
    "U32": Dtype(4, "uint32"),
    "F16": Dtype(2, "float16", np.float16),
    "BF16": Dtype(2, "bfloat16", np.uint16),
    "I16": Dtype(2, "int16"),
    "U16": Dtype(2, "uint16"),
    "I8": Dtype(1, "int8"),
    "U8": Dtype(1, "uint8", np.uint8),
    "BOOL": Dtype(1, "bool_"),
    "F8_E4M3": Dtype(1, None),
    "F8_E5M2": Dtype(1, None),
}
# The float dtypes of weights and adapters, by code: their names in MLX and PEFT.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def code_of(dtype: mx.Dtype) -> str:
    """The format's code for an MLX dtype."""
    name = str(dtype).removeprefix("mlx.core.")
    return next(code for code, known in DTYPES.items() if known.name == name)


class StoredTensor(NamedTuple):
    """Where a tensor is in its file.

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
    """The tensors of a safetensors file by name; each access reads the disk and caches nothing.

    Attributes:
        path: the file.
        header: the header's JSON bytes, without the 8 bytes before them that hold their length.
        entries: where each tensor is, in the header's order.
        metadata: the header's ``__metadata__``.
        data_start: offset of the first byte after the header.
        size: the file's size in bytes.

    Args:
        path: the file.
        what: how error messages begin.

    Raises:
        UserError: it is missing or cut short, or its header is invalid: not JSON, absurdly long, or
            with tensors that overlap, leave gaps or do not have their shape's size (the safetensors
            package's own checks).
    """

    def __init__(self, path: Path, what: str):
        check_safetensors(path, what)
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.header = file.read(length)
        self.data_start = 8 + length
        header = json.loads(self.header)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries = {
            name: StoredTensor(
                entry["dtype"],
                tuple(entry["shape"]),
                *(self.data_start + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        }
        self.size = max((entry.stop for entry in self.entries.values()), default=self.data_start)

    def by_offset(self) -> list[tuple[str, StoredTensor]]:
        """Names and entries, in the order of the tensors' offsets."""
        return sorted(self.entries.items(), key=lambda item: item[1].start)

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
        if code not in DTYPES or DTYPES[code].name is None:
            raise UserError(f"{name} in {self.path} has dtype {code}, which MLX does not support")
        return getattr(mx, DTYPES[code].name)

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own version would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def tensor_size(code: str, shape: tuple[int, ...]) -> int:
    """The bytes that a tensor takes, by the format's dtype code and its shape."""
    return DTYPES[code].size * math.prod(shape)


def tensors_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file, and the offset of each tensor, in file order.

    Order and alignment follow huggingface/safetensors (``tensor.rs::prepare``): wide dtypes first,
    then by name, the header padded with spaces to a multiple of 8 bytes.

    Args:
        tensors: the format's dtype code and the shape, by name.
        metadata: the header's ``__metadata__``.
    """
    sizes = {name: tensor_size(*layout) for name, layout in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].size, name)):
        code, shape = tensors[name]
        start, end = end, end + sizes[name]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    starts = {n: 8 + len(text) + header[n]["data_offsets"][0] for n in header if n in sizes}
    return len(text).to_bytes(8, "little") + text, starts


def write_tensors(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, tensor by tensor; equal tensors give equal bytes.

    MLX's own writer does not report a full disk, and the safetensors package does not accept
    bfloat16 from MLX.
    """
    import mlx.core as mx

    described = {name: (code_of(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    header, starts = tensors_header(described, metadata)

    def write(file: BinaryIO) -> None:
        file.write(header)
        for name in starts:
            file.write(memoryview(mx.contiguous(tensors[name]).reshape(-1).view(mx.uint8)))

    replace_file(path, write)


def read_tensors(path: Path, what: str) -> dict[str, mx.array]:
    """Read a safetensors file.

    Raises:
        UserError: as ``TensorFile``, or a tensor has a dtype that MLX does not support.
    """
    return dict(TensorFile(path, what))


def check_safetensors(path: Path, what: str) -> None:
    """Raise a UserError unless ``path`` is a safetensors file whose header fits its size."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_file(path), safe_open(str(path), "np"):
            pass
    except FileNotFoundError:
        raise UserError(f"{what} is missing: there is no {path}") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read: {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(
            f"{what} is damaged or cut short: {path}: {first_line(error)}; "
            "copy or download it again"
        ) from None
