"""What every adapter boils down to: a pair of matrices and a scale per module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from tlora_mlx.errors import UserError
from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.models.names import unexportable
from tlora_mlx.storage.safetensors import FLOATS

# float32's largest number: scales are applied in float32.
LARGEST = 3.4028234e38
# Of a module's name; the longest ones of real models have about 80 characters.
LONGEST_NAME = 1000


@dataclass(frozen=True)
class Adapter:
    """A validated LoRA adapter, whichever tool it came from.

    Attributes:
        plan: rank, effective scale and shape per module; sensitivities are 0 if another tool made
            the adapter.
        tensors: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out) per adapted module, in
            the dtype of the file; those of a run are read on demand.
        source: the name of the format that it was read from, or ``combined``.
        directory: where it is on this machine; None if it was not read from a directory.
        config: the content of its ``adapter_config.json``, or a record of what it was made from.
        model: the model to load it on, a directory or Hub repository; None if unknown.
        original: the full-precision model behind that one, if known.
        model_type: the family of the model that it is bound to; None while its modules still have
            another tool's names.
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
        """How messages refer to it."""
        if self.directory:
            return str(self.directory)
        return " + ".join(part["path"] for part in self.config["made_from"]["adapters"])

    def adapted(self) -> dict[str, ModulePlan]:
        """The modules that have an adapter.

        Raises:
            UserError: there are none.
        """
        if modules := self.plan.adapted():
            return modules
        raise UserError(f"{self.label} adapts no module, so there is nothing to export")

    def base_on_hugging_face(self, base_model: str | None, advice: str) -> str:
        """The full-precision model that an export is for, under Hugging Face's names.

        Args:
            base_model: what the user says it is; if None, what the adapter says.
            advice: what to do if neither says.

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
    """The plan that matches an adapter's tensors, in the order of the layers.

    Args:
        path: the file, for messages.
        tensors: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out).
        rank: the adapter's nominal rank.
        alpha: its nominal alpha.
        scale_of: the effective scale of a module, by name and rank.

    Raises:
        UserError: there are no tensors, one of a pair is missing, a pair does not fit together, or
            a tensor has no float dtype or is not finite; all faults in one message.
    """
    faults = [f"{key} is {_fault(value)}" for key, value in tensors.items() if _fault(value)]
    modules = {}
    names = {key.rpartition(".")[0] for key in tensors}
    if long := [name for name in names if len(name) > LONGEST_NAME]:
        raise UserError(
            f"the adapter {path} is invalid: a module's name has {len(long[0])} characters"
        )
    for name in sorted(names, key=_by_layer):
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
        faults.append("it has no tensors")
    if faults:
        raise UserError(f"the adapter {path} is invalid: {'; '.join(faults)}")
    return RankPlan(rank, alpha, modules)


def _fault(tensor: mx.array) -> str | None:
    if tensor.ndim != 2:
        return f"of shape {tuple(tensor.shape)}, not a linear layer's"
    if tensor.size == 0:
        return f"of shape {tuple(tensor.shape)}, which is empty"
    if str(tensor.dtype).removeprefix("mlx.core.") not in FLOATS.values():
        dtype = str(tensor.dtype).removeprefix("mlx.core.")
        return f"of dtype {dtype}, not a 16-bit or 32-bit float"
    if not mx.isfinite(tensor).all().item():
        return "not finite"
    return None


def _by_layer(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number above 0 that float32 can hold."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and 0 < value <= LARGEST


def is_rank(value: Any) -> bool:
    """Whether a value from JSON is a whole number above 0, small enough for a dimension."""
    return type(value) is int and 0 < value < 2**31
