"""Large files, read and written in blocks by several threads; stored floats to float32 and back."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tlora_mlx.errors import RunError
from tlora_mlx.storage.safetensors import TensorFile


class Scratch(threading.local):
    """Arrays that each thread reuses: allocating memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Any], np.ndarray] = {}

    def array(self, key: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of this shape; its contents are arbitrary."""
        size = int(np.prod(shape))
        kept = self._kept.get((key, dtype))
        if kept is None or kept.size < size:
            kept = self._kept[key, dtype] = np.empty(size, dtype)
        return kept[:size].reshape(shape)


class OpenFile:
    """An open file that several threads read and write at offsets."""

    def __init__(self, path: Path, size: int | None = None, patch: bool = False):
        """Open for reading, create a file of ``size`` bytes, or ``patch`` an existing one."""
        flags = os.O_RDWR if patch else os.O_RDONLY
        if size is not None:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self._path, self._descriptor = path, os.open(path, flags, 0o666)
        # The kernel lets only one thread at a time write to a file; the others would spin.
        self._writing = threading.Lock()
        if size is not None:
            os.ftruncate(self._descriptor, size)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, into: np.ndarray) -> np.ndarray:
        """Fill a contiguous array with the bytes from ``offset`` on; returns it."""
        rest = memoryview(into.reshape(-1).view(np.uint8))
        while rest:
            count = os.preadv(self._descriptor, [rest], offset)
            if not count:
                raise RunError(f"{self._path} got shorter while it was being read")
            rest, offset = rest[count:], offset + count
        return into

    def write(self, offset: int, data: np.ndarray) -> None:
        """Write a contiguous array at ``offset``."""
        rest = memoryview(data.reshape(-1).view(np.uint8))
        with self._writing:
            while rest:
                count = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[count:], offset + count

    def sync(self) -> None:
        """Wait until everything is on disk."""
        os.fsync(self._descriptor)


def segments(file: TensorFile, touched: Collection[str]) -> Iterator[tuple[str | None, int, int]]:
    """The whole file as (name, start, stop): the ``touched`` tensors and (None) what is between."""
    position = 0
    for name, entry in file.by_offset():
        if name in touched:
            if position < entry.start:
                yield None, position, entry.start
            yield name, entry.start, entry.stop
            position = entry.stop
    if position < file.size:
        yield None, position, file.size


def decode(stored: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Stored floats (uint16 is bfloat16) as float32, into ``out``."""
    if stored.dtype == np.uint16:
        bits = out.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, stored)
    return out


def encode(values: np.ndarray, out: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Finite float32 values as stored floats, into ``out``, rounded to nearest, ties to even."""
    if out.dtype == np.uint16:
        bits = values.view(np.uint32)
        rounded = scratch.array("rounded", values.shape, np.uint32)
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        np.copyto(out, rounded, casting="unsafe")
    else:
        np.copyto(out, values, casting="same_kind")
    return out


# Entries processed at a time: more do not fit into a core's cache, and with fewer the threads
# wait for each other more often.
BLOCK = 1 << 19


def blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Row ranges of a matrix that hold about ``BLOCK`` entries each."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def tensor_bytes(file: TensorFile, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor's bytes, block by block, each with its offset within the tensor."""
    entry = file.entries[name]
    with OpenFile(file.path) as source:
        for start, stop in blocks(entry.stop - entry.start, 1):
            yield start, source.read(entry.start + start, np.empty(stop - start, np.uint8))


def same_bytes(one: TensorFile, other: TensorFile, name: str) -> bool:
    """Whether a tensor has the same bytes in two files; both must have it, as long."""
    pairs = zip(tensor_bytes(one, name), tensor_bytes(other, name), strict=True)
    return all(np.array_equal(mine[1], theirs[1]) for mine, theirs in pairs)
