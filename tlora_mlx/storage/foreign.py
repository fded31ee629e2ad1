"""Files that others made: links that lead elsewhere are refused, and devices are not read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from tlora_mlx.errors import UserError


def file_in(directory: Path, name: str | Path) -> Path:
    """The path of a file in a directory that somebody else may have made; it need not exist.

    Through a link, such a directory could bring any file of this machine into an export or a page:
    ``/proc/self/environ``, which holds tokens. Links into the Hub client's cache are fine: its
    directories consist of links to ``blobs``.

    Args:
        directory: the directory.
        name: the file's path in it.

    Raises:
        UserError: it is a link to somewhere outside.
    """
    path = directory / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if real.is_relative_to(home):
        return path
    from huggingface_hub import constants

    cache = Path(os.path.realpath(constants.HF_HUB_CACHE))
    is_blob = real.parent.name == "blobs" and real.is_relative_to(cache)
    # The cache of another HF_HOME: models--OWNER--NAME/snapshots/REVISION.
    is_blob |= home.parent.name == "snapshots" and real.parent == home.parents[1] / "blobs"
    if not is_blob:
        raise UserError(
            f"{path} is a link to {real}, outside of its directory; if you trust it, replace it "
            "with a copy"
        )
    return path


def open_file(path: Path) -> BinaryIO:
    """Open a file or a pipe for reading; anything else could be endless.

    Raises:
        OSError: it cannot be read.
    """

    def opened(name: str, flags: int) -> int:
        # Otherwise, opening a named pipe that nobody writes to would never return.
        return os.open(name, flags | os.O_NONBLOCK)

    file = open(path, "rb", opener=opened)  # noqa: SIM115, the caller closes it
    mode = os.fstat(file.fileno()).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        file.close()
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    os.set_blocking(file.fileno(), True)
    return file


def read_file(path: Path) -> bytes:
    """The content of a file or a pipe.

    Raises:
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        try:
            return file.read()
        except MemoryError:
            raise OSError(errno.EFBIG, "it does not fit into memory", str(path)) from None
