"""Writing files whole or not at all: beside, synced, renamed."""

from __future__ import annotations

import json
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
    except Exception as error:
        beside.unlink(missing_ok=True)
        # safetensors wraps the system's error in an exception of its own.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or first_line(error)
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
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} is missing: there is no {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read: {path}: {first_line(error)}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON: {path}: {first_line(error)}") from None


def write_tensors(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole, in the order of the names: the same bytes each time."""
    import mlx.core as mx
    from safetensors import serialize_file

    names = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
    data = {}
    for name in sorted(tensors):
        tensor = mx.contiguous(tensors[name])
        mx.eval(tensor)
        data[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data": bytes(memoryview(tensor.view(mx.uint8))) if tensor.size else b"",
        }
    replace_file(path, lambda beside: serialize_file(data, str(beside), dict(metadata)))


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
