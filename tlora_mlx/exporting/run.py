"""Another tool's adapter, or several combined, as a run directory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tlora_mlx.exporting.delta import run_delta
from tlora_mlx.exporting.proof import DTYPES, finite_in, prove_adapter
from tlora_mlx.files import new_directory, write_json, write_tensors
from tlora_mlx.run_directory import ADAPTERS, CONFIG, PLAN, Run, read_run
from tlora_mlx.terminal import say
from tlora_mlx.version import __version__


def export_run(run: Run, output: Path, dtype: str = "float32") -> Path:
    """Write a run directory that ``load_run`` and every command read.

    Args:
        run: what ``read_as_run`` or ``combine`` gave.
        output: directory to make; must not exist, or be empty.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.

    Returns:
        ``output``.

    Raises:
        UserError: a value overflows ``dtype``, or ``output`` is taken.
        RunError: it could not be written, or not as it should be; nothing is left of it.
    """
    tensors = {key: value.astype(DTYPES[dtype]) for key, value in run.tensors.items()}
    finite_in(tensors, dtype)
    with new_directory(output) as beside:
        write_json(beside / PLAN, run.plan.to_dict())
        write_tensors(beside / ADAPTERS, tensors, {"format": "mlx"})
        write_json(beside / CONFIG, {"versions": {"tlora_mlx": __version__}, **run.config})
        say(prove_adapter(run, partial(run_delta, read_run(beside)), dtype).summary())
    return output
