"""Fetch llama.cpp for the tests: the library, prebuilt, from npm, and the converters from PyPI.

    python scripts/get_llama_cpp.py     # prints the directory; about 90 MB, once

The directory is in the user's cache. Only Linux on x86-64 is known here; with another machine, or
without npm, it fails and says why.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

NPM = "@node-llama-cpp/linux-x64@3.21.1"  # libllama 0.4.0
PYPI = "llama-cpp-python==0.3.36"  # with llama.cpp's sources of that time
KEPT = (  # of the second one's members
    "vendor/llama.cpp/convert_hf_to_gguf.py",
    "vendor/llama.cpp/convert_lora_to_gguf.py",
    "vendor/llama.cpp/conversion/",
    "vendor/llama.cpp/gguf-py/",
)


class CannotFetchError(Exception):
    """llama.cpp cannot be had on this machine; the message says why."""


def llama_cpp_directory() -> Path:
    """The directory with ``lib/`` and ``converters/``, fetched if it is not there yet.

    Raises:
        CannotFetchError: it cannot be had.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "tlora-mlx" / "llama-cpp-0.4.0"
    if directory.exists():
        return directory
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise CannotFetchError("llama.cpp is fetched for Linux on x86-64 only")
    if not shutil.which("npm"):
        raise CannotFetchError("npm, which fetches llama.cpp's library, is not installed")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        staging = Path(temporary)
        _run("npm", "pack", "--silent", NPM, cwd=staging)
        options = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        _run(sys.executable, "-m", "pip", *options, PYPI, cwd=staging)
        made = staging / "made"
        _unpack(next(staging.glob("*.tgz")), "package/bins/linux-x64/", made / "lib")
        source = next(staging.glob("*.tar.gz"))
        for member in KEPT:
            root = f"{source.name.removesuffix('.tar.gz')}/"
            _unpack(source, root + member, made / "converters", root + "vendor/llama.cpp/")
        try:
            made.rename(directory)
        except OSError:
            if not directory.exists():  # another process was faster
                raise
    return directory


def _run(*command: str, cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise CannotFetchError(f"{command[0]} took more than 5 minutes") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CannotFetchError(f"{Path(command[0]).name} could not fetch llama.cpp: {last}")


def _unpack(archive: Path, wanted: str, target: Path, root: str | None = None) -> None:
    """Unpack the files whose name starts with ``wanted``, without the ``root`` of their names."""
    with tarfile.open(archive) as file:
        for member in file.getmembers():
            if member.isfile() and member.name.startswith(wanted):
                path = target / member.name.removeprefix(root or wanted)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.extractfile(member).read())


if __name__ == "__main__":
    try:
        print(llama_cpp_directory())
    except CannotFetchError as error:
        sys.exit(f"error: {error}")
