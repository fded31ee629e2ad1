"""The Python functions that export an adapter as an adapter; each also takes a directory."""

from __future__ import annotations

from pathlib import Path

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.gguf import write_gguf_adapter
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
    names: str = "multimodal",
    dtype: str = "float32",
    base_model: str | None = None,
) -> Proof:
    """Write an adapter as a directory that ``PeftModel.from_pretrained`` loads.

    Args:
        adapter: an adapter, or the directory of a run, a PEFT adapter or an mlx-lm adapter.
        output: directory to create; must be new or empty.
        layout: ``portable``: one rank and scale for all modules, right in every reader;
            ``compact``: exact ranks, through ``rank_pattern`` and ``alpha_pattern``.
        names: for multimodal checkpoints: the module names of the whole model (``multimodal``), or
            of its language model alone (``text``).
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.
        base_model: the ``base_model_name_or_path`` for readers; None: the adapter's own.

    Returns:
        The result of reading the export back and comparing its deltas.

    Raises:
        UserError: as ``PeftFormat.write``, or the adapter cannot be read.
        RunError: writing failed, or what was read back differs; nothing is left behind.
    """
    resolved = resolve_adapter(adapter, base_model)
    return PEFT.write(resolved, Path(output), dtype, base_model, layout, names)


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
        output: directory to create; must be new or empty.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.
        base_model: the model that the export names as its base; None: the adapter's own.

    Returns:
        The result of reading the export back and comparing its deltas.

    Raises:
        UserError: as ``MlxLmFormat.write``, or the adapter cannot be read.
        RunError: writing failed, or what was read back differs; nothing is left behind.
    """
    return MLX_LM.write(resolve_adapter(adapter, base_model), Path(output), dtype, base_model)


def export_run(
    adapter: Adapter | str | Path, output: str | Path, *, dtype: str = "float32"
) -> Proof:
    """Write another tool's adapter, or a combined one, as a run directory.

    Args:
        adapter: as for ``export_peft``.
        output: directory to create; must be new or empty.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.

    Returns:
        The result of reading the export back and comparing its deltas.

    Raises:
        UserError: the adapter cannot be read, a value overflows ``dtype``, or ``output`` exists.
        RunError: writing failed, or what was read back differs; nothing is left behind.
    """
    return RUN.write(resolve_adapter(adapter), Path(output), dtype)


def export_gguf_adapter(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    dtype: str = "float32",
    base_model: str | None = None,
) -> Proof:
    """Write an adapter as a directory with ``adapter.gguf``, which llama.cpp takes as ``--lora``.

    Args:
        adapter: as for ``export_peft``.
        output: directory to create; must be new or empty.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.
        base_model: the model that the file names as its base; None: the adapter's own.

    Returns:
        The result of reading the export back and comparing its deltas.

    Raises:
        UserError: as ``write_gguf_adapter``, or the adapter cannot be read.
        RunError: writing failed, or what was read back differs; nothing is left behind.
    """
    resolved = resolve_adapter(adapter, base_model)
    return write_gguf_adapter(resolved, Path(output), dtype, base_model)
