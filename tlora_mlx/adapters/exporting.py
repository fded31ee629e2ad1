"""Exports of an adapter as an adapter, for Python: a path is taken wherever an adapter is."""

from __future__ import annotations

from pathlib import Path

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.mlx_lm import MLX_LM
from tlora_mlx.adapters.peft import PEFT
from tlora_mlx.adapters.proof import Proof
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.adapters.run import RUN


def export_peft(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    layout: str = "portable",
    dtype: str = "float32",
    base_model: str | None = None,
) -> Proof:
    """Write an adapter as a directory that ``PeftModel.from_pretrained`` loads.

    Args:
        adapter: what was read, or the directory of a run, a PEFT or an mlx-lm adapter.
        output: directory to make; must not exist, or be empty.
        layout: ``portable``: one rank and scale for all modules, right in every reader;
            ``compact``: exact ranks by ``rank_pattern`` and ``alpha_pattern``.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.
        base_model: the ``base_model_name_or_path`` for readers; the adapter's own where it is None.

    Returns:
        The proof: what was written was read back, and the deltas compared.

    Raises:
        UserError: as ``PeftFormat.write``, or the adapter cannot be read.
        RunError: it could not be written, or not as it should be; nothing is left of it.
    """
    resolved = resolve_adapter(adapter, base_model)
    return PEFT.write(resolved, Path(output), dtype, base_model, layout)


def export_mlx_lm(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    dtype: str = "float32",
    base_model: str | None = None,
) -> Proof:
    """Write an adapter as a directory that mlx-lm takes as ``--adapter-path``.

    Args:
        adapter: as for ``export_peft``.
        output: directory to make; must not exist, or be empty.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.
        base_model: the model that the adapter names as its own; the run's where it is None.

    Returns:
        The proof: what was written was read back, and the deltas compared.

    Raises:
        UserError: as ``MlxLmFormat.write``, or the adapter cannot be read.
        RunError: it could not be written, or not as it should be; nothing is left of it.
    """
    return MLX_LM.write(resolve_adapter(adapter, base_model), Path(output), dtype, base_model)


def export_run(
    adapter: Adapter | str | Path, output: str | Path, *, dtype: str = "float32"
) -> Proof:
    """Write another tool's adapter, or a combined one, as a run directory.

    Args:
        adapter: as for ``export_peft``.
        output: directory to make; must not exist, or be empty.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.

    Returns:
        The proof: what was written was read back, and the deltas compared.

    Raises:
        UserError: the adapter cannot be read, a value overflows ``dtype``, or ``output`` is taken.
        RunError: it could not be written, or not as it should be; nothing is left of it.
    """
    return RUN.write(resolve_adapter(adapter), Path(output), dtype)
