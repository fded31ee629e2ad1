"""A LoRA adapter of mlx-lm: one rank and one scale for all of its modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tlora_mlx.errors import UserError
from tlora_mlx.files import read_tensors
from tlora_mlx.importing.adapter import Adapter, is_number, plan_of

TENSORS = "adapters.safetensors"


def read_mlx_lm(path: Path, config: dict[str, Any]) -> Adapter:
    """Read an mlx-lm adapter directory whose ``adapter_config.json`` is ``config``.

    Source of the format: ml-explore/mlx-lm, ``mlx_lm/tuner/utils.py::load_adapters``.

    Raises:
        UserError: it is DoRA or a full fine-tune, adapts stacks of experts, has no rank and scale,
            its file is missing or damaged, or its tensors are not those that mlx-lm would expect.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UserError(f"the mlx-lm adapter {path} is of type {kind}; only lora can be taken over")
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if type(rank) is not int or rank < 1 or not is_number(scale):
        raise UserError(
            f"the mlx-lm adapter {path} has no 'lora_parameters' with 'rank' and 'scale' above 0"
        )
    tensors = read_tensors(path / TENSORS, "the mlx-lm adapter")
    unknown = [key for key in tensors if not key.endswith((".lora_a", ".lora_b"))]
    if unknown:
        raise UserError(
            f"the mlx-lm adapter {path / TENSORS} has tensors that are no LoRA of a linear layer: "
            f"{', '.join(sorted(unknown))}"
        )
    stacks = sorted({key.rpartition(".")[0] for key, tensor in tensors.items() if tensor.ndim == 3})
    if stacks:
        raise UserError(
            f"the mlx-lm adapter {path} adapts stacks of experts, which cannot be taken over: "
            f"{', '.join(stacks)}"
        )
    plan = plan_of(path / TENSORS, tensors, rank, rank * scale, lambda name, of_tensor: scale)
    differing = [f"{name} has {m.rank}" for name, m in plan.modules.items() if m.rank != rank]
    if differing:
        raise UserError(
            f"the mlx-lm adapter {path} does not fit itself: its configuration has rank {rank}, "
            f"and {', '.join(differing)}"
        )
    base = config.get("model")
    return Adapter(path, "mlx-lm", config, base if isinstance(base, str) else None, plan, tensors)
