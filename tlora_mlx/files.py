"""Writing files whole or not at all: beside, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora_mlx.errors import RunError, UserError, first_line

if TYPE_CHECKING:
    import mlx.core as mx

# Bytes per entry of the dtypes that are written, by the codes of huggingface/safetensors.
ITEM_SIZES = {"U64": 8, "I64": 8, "F64": 8, "U32": 4, "I32": 4, "F32": 4, "U16": 2, "I16": 2}
ITEM_SIZES |= {"F16": 2, "BF16": 2, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def user_path(text: str | Path) -> Path:
    """A path as the user gave it, ``~`` replaced; one with an unknown user's home is left as is."""
    return Path(os.path.expanduser(text))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, sync it, and rename it to ``path``.

    Raises:
        RunError: it could not be written (disk full, no permission); ``path`` is as it was before.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        write(beside)
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    except BaseException as error:  # Ctrl-C too
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or first_line(error)
            raise RunError(f"cannot write {path}: {reason}; what was there is unchanged") from None
        raise


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill beside ``path``; it becomes ``path`` when the block ends without error.

    Raises:
        UserError: ``path`` exists and is not an empty directory.
        RunError: it could not be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already; choose another directory or delete it")
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        beside.chmod(0o755)
        yield beside
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole, in the order of ``data``."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, unreadable or not JSON; the sentence begins with ``what``.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair can be escaped, and never written again
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except FileNotFoundError:
        raise UserError(f"{what} is missing: there is no {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read: {path}: {first_line(error)}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of absurd length
        raise UserError(f"{what} is not valid JSON: {path}: {first_line(error)}") from None


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file, and where each tensor starts in it, in order.

    Order and alignment follow huggingface/safetensors (``tensor.rs::prepare``): wide dtypes first,
    then by name, the header padded with spaces to a multiple of 8 bytes.

    Args:
        tensors: the format's dtype code and the shape by name.
        metadata: the header's ``__metadata__``.
    """
    sizes = {n: ITEM_SIZES[code] * math.prod(shape) for n, (code, shape) in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors, key=lambda name: (-ITEM_SIZES[tensors[name][0]], name)):
        code, shape = tensors[name]
        start, end = end, end + sizes[name]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    starts = {n: 8 + len(text) + header[n]["data_offsets"][0] for n in header if n in sizes}
    return len(text).to_bytes(8, "little") + text, starts


def write_tensors(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole, tensor by tensor; the same tensors give the same bytes.

    MLX's own writer does not report a full disk, and the safetensors package takes no bfloat16 from
    MLX.
    """
    import mlx.core as mx

    codes = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint64: "U64"}
    described = {name: (codes[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    header, starts = tensors_header(described, metadata)

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            file.write(header)
            for name in starts:
                file.write(memoryview(mx.contiguous(tensors[name]).reshape(-1).view(mx.uint8)))

    replace_file(path, write)


def read_tensors(path: Path, what: str) -> dict[str, mx.array]:
    """Read a safetensors file.

    Raises:
        UserError: it is missing or no whole safetensors file; the sentence begins with ``what``.
    """
    import mlx.core as mx

    check_safetensors(path, what)
    return dict(mx.load(str(path), format="safetensors"))


def check_safetensors(path: Path, what: str) -> None:
    """Raise a UserError unless ``path`` is a safetensors file whose header fits its size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np"):
            pass
    except FileNotFoundError:
        raise UserError(f"{what} is missing: there is no {path}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{what} is damaged or cut short: {path}: {first_line(error)}; "
            "copy or download it again"
        ) from None
