"""What keeps a program from the rest of the machine: bubblewrap, namespaces, or macOS's sandbox.

Sources: bwrap(1) and unshare(1); for macOS sandbox-exec(1) and the profiles in
/System/Library/Sandbox/Profiles.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which

# Bytes that a program may write in all, where its directory is in memory.
SPACE = 64 << 20
# As root in its own namespaces, puts the directory into memory, and gives up what root may do.
_ENTER = (
    f'mount -t tmpfs -o size={SPACE},nosuid,nodev none "$1" && cd "$1" && shift && '
    'exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs -- "$@"'
)


@dataclass(frozen=True)
class Sandbox:
    """A way to start a command with less access.

    Attributes:
        name: the program that does it; None: nothing does.
        covers: what it keeps the command from, for the user.
        command: from a directory to work in and a command, the command that starts it in there.
    """

    name: str | None
    covers: str
    command: Callable[[Path, Sequence[str]], list[str]]

    def exists(self) -> bool:
        """Whether this machine has the program, which may still not be allowed to work."""
        return self.name is None or which(self.name) is not None


def _python() -> list[str]:
    """The directories that Python and its packages are in."""
    return sorted({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)} | {sys.prefix})


def _hidden() -> list[str]:
    """The directories in which people keep their secrets."""
    places = ("/home", "/root", "/tmp", "/run", os.path.realpath(Path.home()))
    return [place for place in dict.fromkeys(places) if os.path.isdir(place) and place != "/"]


def _bubblewrap(place: Path, command: Sequence[str]) -> list[str]:
    start = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    start += ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    for hidden in _hidden():
        start += ["--tmpfs", hidden]
    for path in _python():
        start += ["--ro-bind", path, path]
    start += ["--size", str(SPACE), "--tmpfs", str(place), "--chdir", str(place)]
    return [*start, "--", *command]


def _namespaces(place: Path, command: Sequence[str]) -> list[str]:
    start = ["unshare", "--user", "--map-root-user", "--net", "--ipc", "--uts", "--pid", "--fork"]
    start += ["--kill-child", "--mount-proc", "--", "sh", "-c", _ENTER, "sh", str(place)]
    return [*start, *command]


def _macos(place: Path, command: Sequence[str]) -> list[str]:
    def paths(*names: str) -> str:
        quoted = (name.replace("\\", "\\\\").replace('"', '\\"') for name in names)
        return " ".join(f'(subpath "{name}")' for name in quoted)

    profile = f"""(version 1) (allow default) (deny network*) (deny process-fork)
(deny file-write*) (allow file-write* {paths(str(place))} (literal "/dev/null"))
(deny file-read-data {paths(os.path.realpath(Path.home()))})
(allow file-read-data {paths(str(place), *_python())})"""
    return ["sandbox-exec", "-p", profile, *command]


# The best one first.
SANDBOXES = (
    Sandbox(
        "bwrap",
        "no network, no other processes, nothing of your files but the system's and Python's, and "
        "of those nothing to write",
        _bubblewrap,
    ),
    Sandbox(
        "unshare",
        "no network and no other processes; they can read and write your files",
        _namespaces,
    ),
    Sandbox(
        "sandbox-exec",
        "no network, no new processes, nothing to write but their own directory, and nothing to "
        "read in your home directory",
        _macos,
    ),
    Sandbox(
        None,
        "limits only: they run as you, with your files, and may start processes that stay; "
        "bubblewrap would keep them from it",
        lambda place, command: list(command),
    ),
)
