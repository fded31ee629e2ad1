"""A run directory is one training process's while it is in use."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tlora_mlx.errors import UserError


class RunLock:
    """The lock on a run directory; the system lets go of it when the process ends, however it does.

    Where the file system has no locks, there is none.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, unless it is held already; the directory must exist.

        Raises:
            UserError: another process has it.
        """
        if self._descriptor is not None:
            return
        self._descriptor = os.open(self._path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(
                f"--adapter-path {self._path} is in use by another training process; wait for "
                "it or choose another directory"
            ) from None
        except OSError:  # a file system without locks
            pass

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
