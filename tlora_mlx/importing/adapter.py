"""What every adapter directory comes down to: a pair of matrices and a scale per module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from tlora_mlx.errors import UserError
from tlora_mlx.method.allocation import ModulePlan, RankPlan

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Adapter:
    """An adapter directory, checked, under the module names that it uses itself.

    Attributes:
        format: ``tlora`` (a run), ``peft`` or ``mlx-lm``.
        config: its ``adapter_config.json``.
        base: the base model that it names, if it names one.
        plan: rank, effective scale and shape per module; another tool's has no sensitivities (0).
        tensors: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out) per adapted module.
    """

    path: Path
    format: str
    config: dict[str, Any]
    base: str | None
    plan: RankPlan
    tensors: dict[str, mx.array]


def plan_of(
    path: Path,
    tensors: Mapping[str, mx.array],
    rank: int,
    alpha: float,
    scale_of: Callable[[str, int], float],
) -> RankPlan:
    """The plan that tensors follow: ranks and shapes are theirs, first layer first.

    Args:
        path: the file, for messages.
        tensors: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out).
        rank: the adapter's nominal rank.
        alpha: its nominal alpha.
        scale_of: the effective scale of a module, by name and rank.

    Raises:
        UserError: there is no tensor, one of a pair is missing, or a pair does not fit, is of no
            floating dtype or not finite; all faults in one message.
    """
    faults = [f"{key} is {_fault(value)}" for key, value in tensors.items() if _fault(value)]
    modules = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}, key=_by_layer):
        a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if a is None or b is None:
            faults.append(f"{name} has {'only B' if a is None else 'only A'}")
        elif a.ndim == b.ndim == 2:
            if a.shape[1] != b.shape[0]:
                faults.append(f"{name} has A of rank {a.shape[1]} and B of rank {b.shape[0]}")
            else:
                modules[name] = ModulePlan(
                    a.shape[1], scale_of(name, a.shape[1]), 0.0, b.shape[1], a.shape[0]
                )
    if not tensors:
        faults.append("it holds no tensor")
    if faults:
        raise UserError(f"the adapter {path} is not right: {'; '.join(faults)}")
    return RankPlan(rank, alpha, modules)


def _fault(tensor: mx.array) -> str | None:
    if tensor.ndim != 2:
        return f"of shape {tuple(tensor.shape)}, and no linear layer's"
    if tensor.size == 0:
        return f"of shape {tuple(tensor.shape)}, and empty"
    if tensor.dtype not in DTYPES:
        dtype = str(tensor.dtype).removeprefix("mlx.core.")
        return f"of dtype {dtype}, and no float of 16 or 32 bits"
    if not mx.isfinite(tensor).all().item():
        return "not finite"
    return None


def _by_layer(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number above 0."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and 0 < value <= sys.float_info.max
