"""A model's safetensors files on disk: which tensor is in which, read and written in blocks."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from tlora_mlx.errors import RunError, UserError
from tlora_mlx.files import read_json, replace_file
from tlora_mlx.model_directory import MODEL_FILES, find_model, read_model_config, weight_files
from tlora_mlx.tensor_file import TensorFile

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A model directory, its weight files' headers read and checked; no tensor is read yet.

    The files are those that the index names, or, where there is no index, all that mlx-lm loads.

    Attributes:
        name: how the user calls it.
        path: the directory.
        config: the contents of ``config.json``.
        files: the weight files by name.
        home: the file of each tensor.

    Args:
        name: a directory or a Hub repository.

    Raises:
        UserError: it does not exist, is no model's, holds pickled weights only, its index names a
            file outside of the directory or a tensor that is not where it says, a tensor is in two
            files, or a file is damaged.
    """

    def __init__(self, name: str):
        self.name, self.path = find_model(name)
        self.config = read_model_config(self.path, self.name)
        placed = _read_index(self.path / INDEX)
        shards = sorted(set(placed.values())) or [f.name for f in weight_files(self.path, name)]
        self.files = {s: TensorFile(self.path / s, "a weight file of the model") for s in shards}
        self.home: dict[str, TensorFile] = {}
        faults = [
            f"{tensor} is not in {shard}"
            for tensor, shard in placed.items()
            if tensor not in self.files[shard]
        ]
        for file in self.files.values():
            for tensor in file:
                if tensor in self.home:
                    first = self.home[tensor].path.name
                    faults.append(f"{tensor} is in {first} and in {file.path.name}")
                self.home[tensor] = file
        if faults:
            raise UserError(f"the weights of model {self.name} are not right: {'; '.join(faults)}")

    def copy_other_files(self, output: Path) -> None:
        """Copy what mlx-lm and transformers need besides the weights and their index."""
        # A tokenizer's further templates (transformers, utils/hub.py, CHAT_TEMPLATE_DIR).
        templates = self.path / "additional_chat_templates"
        for source in sorted([*self.path.iterdir(), *templates.glob("*.jinja")]):
            wanted = any(fnmatch(source.name, pattern) for pattern in MODEL_FILES)
            # An index of other weights, or an adapter that happens to lie here, would mislead.
            if fnmatch(source.name, "*.index.json") or source.name == "adapter_config.json":
                continue
            if wanted and source.is_file():
                copy_file(source, output / source.relative_to(self.path))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file whole, into a directory that is made where it does not exist."""
    target.parent.mkdir(exist_ok=True)
    replace_file(target, lambda beside: shutil.copyfile(source, beside))


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor by an index; empty where there is none."""
    if not path.exists():
        return {}
    index: Any = read_json(path, "the index of the model's weights")
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"the index {path} has no table 'weight_map'")
    for tensor, shard in placed.items():
        # A name alone: in the Hub client's cache the file itself may be a link to elsewhere.
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise UserError(f"the index {path} places {tensor} in {shard!r}, no safetensors file")
        if {"/", "\\", "\0"} & set(shard):
            raise UserError(
                f"the index {path} places {tensor} in {shard!r}, outside of the model's directory"
            )
    return placed


class Scratch(threading.local):
    """Arrays that each thread uses over and over: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Any], np.ndarray] = {}

    def array(self, key: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of this shape, with whatever it held before."""
        size = int(np.prod(shape))
        kept = self._kept.get((key, dtype))
        if kept is None or kept.size < size:
            kept = self._kept[key, dtype] = np.empty(size, dtype)
        return kept[:size].reshape(shape)


class OpenFile:
    """A file by its descriptor, read and written at offsets, from several threads."""

    def __init__(self, path: Path, size: int | None = None, patch: bool = False):
        """Open for reading, or make a new file of ``size`` bytes, or ``patch`` one that exists."""
        flags = os.O_RDWR if patch else os.O_RDONLY
        if size is not None:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._path, self._descriptor = path, os.open(path, flags, 0o644)
        # The kernel lets one thread at a time write a file, and has the others spin.
        self._writing = threading.Lock()
        if size is not None:
            os.ftruncate(self._descriptor, size)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, into: np.ndarray) -> np.ndarray:
        """Fill a contiguous array from ``offset`` on; returns it."""
        rest = memoryview(into.reshape(-1).view(np.uint8))
        while rest:
            count = os.preadv(self._descriptor, [rest], offset)
            if not count:
                raise RunError(f"{self._path} has become shorter while it was read")
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
        """Wait until the disk has it."""
        os.fsync(self._descriptor)


def segments(file: TensorFile, touched: Collection[str]) -> Iterator[tuple[str | None, int, int]]:
    """The whole file as (name, start, stop): tensors of ``touched``, and whatever is between."""
    position = 0
    for name, entry in file.entries.items():
        if name in touched:
            if position < entry.start:
                yield None, position, entry.start
            yield name, entry.start, entry.stop
            position = entry.stop
    if position < file.size:
        yield None, position, file.size


# The float dtypes that a delta is added to: their names, and what numpy sees of them in a file.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED: dict[str, type] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8}


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
