"""Atomic writes: files and directories are staged, synced and renamed."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tlora_mlx.errors import RunError, UserError, first_line, shown
from tlora_mlx.storage.foreign import open_file, read_file


def user_path(text: str | Path) -> Path:
    """The user's path with ``~`` expanded; ``~NAME`` of an unknown user is left as it is.

    Raises:
        UserError: it is not UTF-8, so it could not be written into a configuration; or it cannot be
            a path (a NUL in it, too long, a circle of links, in a directory without access).
    """
    if not is_unicode(str(text)):
        raise UserError(f"path {str(text)!r} is not UTF-8 text; rename it")
    try:
        path = Path(os.path.expanduser(text))
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{shown(str(text))} cannot be used as a path: {reason}") from None
    return path


def is_unicode(text: str) -> bool:
    """Whether a text has no bytes that Python kept because they were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have ``write`` fill a new file beside ``path``, sync it, and rename it to ``path``.

    If ``path`` is a link, the link is replaced; no link is followed.

    Raises:
        RunError: it could not be written (disk full, no permission, a device or a pipe is there);
            ``path`` is unchanged.
    """
    staging = None
    try:
        if not _is_replaceable(path):
            raise OSError(errno.EINVAL, "it is not a file", str(path))
        staging, descriptor = _staged(path, _create_file)
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(descriptor)
            os.replace(staging, path)
        staging = None
        sync(path.parent)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise RunError(f"cannot write {path}: {reason}; any existing file is unchanged") from None
    finally:
        if staging is not None:  # Ctrl-C too
            staging.unlink(missing_ok=True)


def _is_replaceable(path: Path) -> bool:
    """Whether a file may take the path's place; a directory refuses by itself.

    Root can rename over devices, and over the links of ``/dev``: then no program of the machine
    finds them until it is started anew.
    """
    if Path(os.path.realpath(path.parent)) == Path("/dev"):
        return False
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return True
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)


# What is to be done with a directory before it appears under its final name.
Finish = Callable[[Path], object]


@contextmanager
def new_directory(path: Path, finish: Finish | None = None) -> Iterator[Path]:
    """A staging directory to fill; it is renamed to ``path`` when the block ends without an error.

    Args:
        path: the directory to create; must be new or empty.
        finish: called with the staging directory after the block, to add more.

    Raises:
        UserError: ``path`` exists and is not an empty directory.
        RunError: it could not be written.
    """
    staging = descriptor = None
    try:
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path} already exists; choose another directory or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        staging, descriptor = _staged(path, _create_directory)
        yield staging
        if finish:
            finish(staging)
        os.fsync(descriptor)
        os.replace(staging, path)
        sync(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _staged(path: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """A new file or directory beside ``path``, and its descriptor, which locks it while it is open.

    Its name cannot be foreseen. What killed processes left beside ``path`` is deleted first.
    """
    sweep(path.parent, path.name)
    while True:
        staging = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        descriptor = create(staging)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if staging.exists():  # else another process swept it before it was locked
            return staging, descriptor
        os.close(descriptor)


def _create_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def _create_directory(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def sweep(directory: Path, name: str) -> None:
    """Delete what killed processes left half-written in a directory.

    Args:
        directory: where they were writing.
        name: of the file or directory that it was to become; ``*`` for all.
    """
    name = name if name == "*" else glob.escape(name)
    for left in directory.glob(f".{name}.{'[0-9a-f]' * 16}.part"):
        with suppress(OSError):  # it is being written, or somebody else deleted it
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically, with its keys in the order of ``data``."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


class UnreadableError(UserError):
    """A file is there but cannot be read: nothing is known about its content."""


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, unreadable (``UnreadableError``) or not JSON; the message begins
            with ``what``.
    """
    try:
        text = read_file(path).decode("utf-8-sig")
        data = json.loads(text)
        if "\\u" in text:  # a lone surrogate can be read when escaped, but not written again
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except FileNotFoundError:
        raise UserError(f"{what} is missing: there is no {path}") from None
    except OSError as error:
        raise UnreadableError(f"{what} cannot be read: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} cannot be read: {path}: {first_line(error)}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also numbers with too many digits
        raise UserError(f"{what} is not valid JSON: {path}: {first_line(error)}") from None


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file.

    Raises:
        UserError: it cannot be read, is not YAML, or has a key twice; the message names ``what``
            and the line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's, which takes the last of equal keys without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: dict[tuple[str, str], int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if first := seen.get((key.tag, key.value)):
                    raise yaml.MarkedYAMLError(
                        problem=f"{shown(key.value)} is on line {first} too; delete one of them",
                        problem_mark=key.start_mark,
                    )
                seen[key.tag, key.value] = key.start_mark.line + 1
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(read_file(path).decode(), Loader)
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {what} {path}: {error}") from None
    except Exception as error:  # whatever the constructors of numbers, truth values and dates raise
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{what} {path} is not valid YAML{line}: {reason}") from None


def file_digest(path: Path, what: str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        UserError: it is missing or unreadable (``UnreadableError``); the message begins with
            ``what``.
    """
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise UserError(f"{what} is missing: there is no {path}") from None
    except OSError as error:
        raise UnreadableError(f"{what} cannot be read: {path}: {error.strerror}") from None
    return digest.hexdigest()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically, into a directory that is created if it does not exist."""
    target.parent.mkdir(exist_ok=True)
    with open_file(source) as content:
        replace_file(target, lambda file: shutil.copyfileobj(content, file, 1 << 20))
