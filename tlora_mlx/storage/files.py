"""Atomic writes: files and directories are staged, synced and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tlora_mlx.errors import RunError, UserError, first_line


def user_path(text: str | Path) -> Path:
    """The user's path with ``~`` expanded; ``~NAME`` of an unknown user is left as it is.

    Raises:
        UserError: it is not UTF-8, so it could not be written into a configuration.
    """
    if not is_unicode(str(text)):
        raise UserError(f"path {str(text)!r} is not UTF-8 text; rename it")
    return Path(os.path.expanduser(text))


def is_unicode(text: str) -> bool:
    """Whether a text has no bytes that Python kept because they were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` create a file next to ``path``, sync it, and rename it to ``path``.

    Raises:
        RunError: it could not be written (disk full, no permission); ``path`` is unchanged.
    """
    staging = path.with_name(f".{path.name}.part")
    try:
        write(staging)
        _sync(staging)
        os.replace(staging, path)
        _sync(path.parent)
    except BaseException as error:  # Ctrl-C too
        staging.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or first_line(error)
            raise RunError(
                f"cannot write {path}: {reason}; any existing file is unchanged"
            ) from None
        raise


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A staging directory to fill; it is renamed to ``path`` when the block ends without an error.

    Raises:
        UserError: ``path`` exists and is not an empty directory.
        RunError: it could not be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} already exists; choose another directory or delete it")
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        staging.chmod(0o755)
        yield staging
        _sync(staging)
        os.replace(staging, path)
        _sync(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace_file(path, lambda staging: staging.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically, with its keys in the order of ``data``."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, unreadable or not JSON; the message begins with ``what``.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        if "\\u" in text:  # a lone surrogate can be read when escaped, but not written again
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except FileNotFoundError:
        raise UserError(f"{what} is missing: there is no {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read: {path}: {first_line(error)}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also numbers with too many digits
        raise UserError(f"{what} is not valid JSON: {path}: {first_line(error)}") from None


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file.

    Raises:
        UserError: it cannot be read or is not YAML; the message names ``what`` and the line.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{what} {path} is not valid YAML{line}: {getattr(error, 'problem', None) or error}"
        ) from None


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically, into a directory that is created if it does not exist."""
    target.parent.mkdir(exist_ok=True)
    replace_file(target, lambda staging: shutil.copyfile(source, staging))
