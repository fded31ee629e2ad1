"""A run as an adapter of mlx-lm, for its own ``generate``, ``server`` and ``fuse``."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from tlora_mlx.exporting.delta import Delta, adapted, float32
from tlora_mlx.exporting.experts import stack_and_number
from tlora_mlx.exporting.proof import DTYPES, Proof, finite_in, prove_adapter
from tlora_mlx.files import new_directory, read_json, write_json, write_tensors
from tlora_mlx.run_directory import Run
from tlora_mlx.tensor_file import TensorFile
from tlora_mlx.terminal import say

CONFIG = "adapter_config.json"
ADAPTERS = "adapters.safetensors"


def export_mlx_lm(
    run: Run, output: Path, dtype: str = "float32", base_model: str | None = None
) -> Path:
    """Write a run as a directory that mlx-lm takes as ``--adapter-path``.

    mlx-lm knows one rank and one scale for all modules (ml-explore/mlx-lm 0.32.2,
    ``mlx_lm/tuner/utils.py``: ``load_adapters``, ``linear_to_lora_layers``). So every module is
    padded with zeros to the largest rank, and its scale is folded into B in float32: mlx-lm's is 1.
    ``keys`` are names inside a block, looked for in the last ``num_layers`` blocks, which is the
    run's own option. Modules of rank 0 are zeros. Experts are stacked as mlx-lm has them, lora_a
    (experts, rank, in) and lora_b (experts, out, rank) (``mlx_lm/tuner/lora.py``,
    ``LoRASwitchLinear``).

    Args:
        run: what ``read_run`` read.
        output: directory to make; must not exist, or be empty.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.
        base_model: the model that the adapter names as its own; the run's where it is None.

    Returns:
        ``output``.

    Raises:
        UserError: a value overflows ``dtype``, or ``output`` is taken.
        RunError: it could not be written, or not as it should be; nothing is left of it.
    """
    modules = run.plan.modules
    rank = max(module.rank for module in adapted(run).values())
    tensors: dict[str, mx.array] = {}
    stacks: dict[str, dict[int, tuple[mx.array, mx.array]]] = {}
    for name, module in modules.items():
        a, b = mx.zeros((module.in_features, rank)), mx.zeros((rank, module.out_features))
        if module.rank:
            a[:, : module.rank] = run.tensors[f"{name}.lora_a"].astype(mx.float32)
            b[: module.rank] = module.scale * run.tensors[f"{name}.lora_b"].astype(mx.float32)
        a, b = a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype])
        stack, number = stack_and_number(name)
        if number is None:
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
        else:
            stacks.setdefault(stack, {})[number] = a.T, b.T
    for name, experts in stacks.items():
        a, b = zip(*(experts[number] for number in sorted(experts)), strict=True)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = mx.stack(a), mx.stack(b)
    finite_in(tensors, dtype)
    config = {
        "fine_tune_type": "lora",
        "model": base_model or run.config["model"],
        "num_layers": run.config.get("num_layers", -1),
        "lora_parameters": {
            "rank": rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({_inside_block(stack_and_number(name)[0]) for name in modules}),
        },
    }
    with new_directory(output) as beside:
        write_tensors(beside / ADAPTERS, tensors, {"format": "mlx"})
        write_json(beside / CONFIG, config)
        say(_prove(run, beside, dtype).summary())
    return output


def _inside_block(name: str) -> str:
    """``self_attn.q_proj`` of ``model.layers.3.self_attn.q_proj``."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[number + 1 :])


def _expert(tensors: TensorFile, key: str, number: int) -> np.ndarray:
    """One expert's matrix of a stack, (experts, rows, columns)."""
    rows = tensors.entries[key].shape[1]
    return float32(tensors.rows(key, number * rows, (number + 1) * rows))


def _prove(run: Run, path: Path, dtype: str) -> Proof:
    """Read the adapter back by mlx-lm's rule: scale · B A with one scale and rank."""
    parameters = read_json(path / CONFIG, "the adapter's configuration")["lora_parameters"]
    rank, scale = parameters["rank"], parameters["scale"]
    tensors = TensorFile(path / ADAPTERS, "the adapter")

    def delta(name: str) -> Delta | None:
        name, number = stack_and_number(name)
        keys = f"{name}.lora_a", f"{name}.lora_b"
        if not set(keys) <= tensors.keys():
            return None
        if number is None:
            a, b = (float32(tensors[key]).T for key in keys)
        else:
            a, b = (_expert(tensors, key, number) for key in keys)
        return Delta(scale * b, a) if len(a) == rank else None

    return prove_adapter(run, delta, dtype)
