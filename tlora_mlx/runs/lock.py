"""The lock that gives one training process a run directory for itself."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tlora_mlx.errors import UserError


class RunLock:
    """The lock on a run directory; the system releases it when the process ends, however it ends.

    On a file system without locks it does nothing.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, unless this object already holds it; the directory must exist.

        Raises:
            UserError: another process holds it.
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
        """Release the lock, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
