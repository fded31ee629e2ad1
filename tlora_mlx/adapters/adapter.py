"""What every adapter comes down to: a pair of matrices and a scale per module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from tlora_mlx.errors import UserError
from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.models.names import unexportable
from tlora_mlx.storage.safetensors import FLOATS


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, checked, wherever it came from.

    Attributes:
        plan: rank, effective scale and shape per module; another tool's has no sensitivities (0).
        tensors: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out) per adapted module, in
            the dtype of the file; a run's are read when they are asked for.
        source: the format that it was read from, by name; ``combined`` where it was made of
            several.
        directory: where it is on this machine; None where it is in no directory.
        config: what its ``adapter_config.json`` says, or says that it was made from.
        model: the model to load it on: a directory or Hub repository; None where it is not known.
        original: the full-precision model behind that one, if it is known.
        model_type: the family of the model that it is bound to; None as long as its modules have
            the names of another tool.
    """

    plan: RankPlan
    tensors: Mapping[str, mx.array]
    source: str
    directory: Path | None
    config: Mapping[str, Any]
    model: str | None = None
    original: str | None = None
    model_type: str | None = None

    @property
    def base(self) -> str | None:
        """The base model as others know it: the full-precision one, or the one to load it on."""
        return self.original or self.model

    @property
    def label(self) -> str:
        """What messages call it."""
        return str(self.directory) if self.directory else "the combined adapter"

    def adapted(self) -> dict[str, ModulePlan]:
        """The modules that have an adapter.

        Raises:
            UserError: none has.
        """
        if modules := self.plan.adapted():
            return modules
        raise UserError(f"no module of {self.label} has an adapter, so there is nothing to export")

    def base_on_hugging_face(self, base_model: str | None, advice: str) -> str:
        """The full-precision model that an export is for, under Hugging Face's names.

        Args:
            base_model: what the user says that it is; the adapter's own where it is None.
            advice: what to do where that is not known.

        Raises:
            UserError: the family or a module has no known Hugging Face name, or the base model is
                not known.
        """
        if reason := unexportable(self.model_type, self.plan.modules):
            raise UserError(f"cannot export {self.label}: {reason}")
        if base := base_model or self.original:
            return base
        raise UserError(
            f"the base model {self.model} is quantized and its card names no original; {advice}"
        )


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
    if str(tensor.dtype).removeprefix("mlx.core.") not in FLOATS.values():
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
