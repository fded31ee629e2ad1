"""What the scripts share: the machine, processes and their memory, random Llamas, Markdown rows."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def machine() -> str:
    """The machine's name, as far as the system tells it, and its GPU where MLX uses one."""
    import mlx.core as mx  # not where this module is imported: by one side of some benchmarks alone

    if mx.default_device() == mx.gpu:
        return f"{_processor()}; {mx.device_info()['device_name']}"
    return _processor()


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")  # Linux only
    for line in cpus.read_text().splitlines() if cpus.exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores, {platform.system()}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def mlx_blas() -> str:
    """The BLAS that MLX computes with in this process."""
    return "OpenBLAS" if "openblas" in os.environ.get("LD_PRELOAD", "") else "MLX's own BLAS"


def peak_resident() -> float:
    """The most MB that were resident so far in this process (getrusage includes the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("this benchmark reads /proc/self/status, so it needs Linux")


def in_own_process(
    script: str, *arguments: object, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a script in a process of its own; returns the JSON object on its last line of output.

    Args:
        script: the path of the script.
        arguments: of its command line.
        environment: the environment variables; this process's where it is None.

    Raises:
        SystemExit: the process failed; with its standard error.
    """
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    return {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}


def llama(hidden: int, layers: int, vocabulary: int, **others: Any) -> dict[str, Any]:
    """The ``config.json`` of a Llama of this width.

    Args:
        hidden: the width; a head has 64 of it, and four heads share a key and a value.
        layers: the number of blocks.
        vocabulary: the number of tokens.
        others: settings that are added, or replace those of here.
    """
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        **others,
    }


def table_row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_head(titles: Sequence[str]) -> str:
    """The head of a Markdown table: the titles, and the line below them."""
    return f"{table_row(titles)}\n|{'---|' * len(titles)}"
