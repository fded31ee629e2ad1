"""A LoRA adapter as mlx-lm stores it: one rank and one scale for all modules, experts stacked.

A run's adapter has this form, so that stock mlx-lm loads the run directory itself. Every module is
padded with zeros to the largest rank, and its scale is folded into B in float32, so that mlx-lm's
scale is 1 (ml-explore/mlx-lm 0.32.2, ``mlx_lm/tuner/utils.py``: ``load_adapters``,
``linear_to_lora_layers``). Modules of rank 0 are zeros. Experts are stacked as in mlx-lm: lora_a
(experts, rank, in) and lora_b (experts, out, rank) (``mlx_lm/tuner/lora.py``,
``LoRASwitchLinear``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx

from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.method.experts import stack_and_number
from tlora_mlx.storage.safetensors import TensorFile

# The metadata of a file in this form. Runs of version 0.1.0 have none: exact ranks, scales apart.
PADDED = {"format": "mlx", "form": "padded"}


def lora_parameters(plan: RankPlan) -> dict[str, Any]:
    """mlx-lm's ``lora_parameters`` for a padded adapter.

    ``keys`` are names within a block; mlx-lm looks for them in the last ``num_layers`` blocks,
    which is another setting.
    """
    return {
        "rank": padded_rank(plan),
        "scale": 1.0,
        "dropout": 0.0,
        "keys": sorted({_inside_block(stack_and_number(name)[0]) for name in plan.modules}),
    }


def padded_rank(plan: RankPlan) -> int:
    """The largest rank; mlx-lm needs at least 1."""
    return max([1, *(module.rank for module in plan.modules.values())])


def _inside_block(name: str) -> str:
    """``self_attn.q_proj`` of ``model.layers.3.self_attn.q_proj``."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[number + 1 :])


def padded(plan: RankPlan, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A plan's adapter in this form.

    Args:
        plan: ranks, scales and shapes of all modules.
        tensors: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out) of the adapted ones.

    Returns:
        A in its own dtype and B in float32, not evaluated.
    """
    rank = padded_rank(plan)
    found: dict[str, mx.array] = {}
    stacks: dict[str, dict[int, tuple[mx.array, mx.array]]] = {}
    for name, module in plan.modules.items():
        a, b = mx.zeros((module.in_features, 0)), mx.zeros((0, module.out_features))
        if module.rank:
            a = tensors[f"{name}.lora_a"]
            b = module.scale * tensors[f"{name}.lora_b"].astype(mx.float32)
        missing = rank - module.rank
        a, b = mx.pad(a, [(0, 0), (0, missing)]), mx.pad(b, [(0, missing), (0, 0)])
        stack, number = stack_and_number(name)
        if number is None:
            found[f"{name}.lora_a"], found[f"{name}.lora_b"] = a, b
        else:
            stacks.setdefault(stack, {})[number] = a.T, b.T
    for name, experts in stacks.items():
        a, b = zip(*(experts[number] for number in sorted(experts)), strict=True)
        found[f"{name}.lora_a"], found[f"{name}.lora_b"] = mx.stack(a), mx.stack(b)
    return found


class Unpadded(Mapping[str, mx.array]):
    """The inverse of ``padded``, read from the file on demand.

    Dividing by the scale restores B to within rounding; scale · B is what the file holds.

    Args:
        plan: the plan that the file was written with. Tensors that do not fit it are given as they
            are, so that whoever checks them can name them.
        file: a file in this form.
    """

    def __init__(self, plan: RankPlan, file: TensorFile):
        self._plan, self._file = plan, file
        self._places: dict[str, tuple[str, int | None]] = {}
        for key, entry in file.entries.items():
            name, _, kind = key.rpartition(".")
            numbers = range(entry.shape[0]) if len(entry.shape) == 3 else (None,)
            for number in numbers:
                module = name if number is None else f"{name}.{number}"
                if module not in plan.modules or plan.modules[module].rank:
                    self._places[f"{module}.{kind}"] = key, number

    def __getitem__(self, key: str) -> mx.array:
        stored, number = self._places[key]
        name, _, kind = key.rpartition(".")
        if number is None:
            tensor = self._file[stored]
        else:
            rows = self._file.entries[stored].shape[1]
            tensor = self._file.rows(stored, number * rows, (number + 1) * rows).T
        module = self._plan.modules.get(name)
        if module is None:
            return tensor
        if kind == "lora_a":
            return mx.contiguous(tensor[:, : module.rank])
        return mx.contiguous(tensor[: module.rank].astype(mx.float32) / (module.scale or 1))

    def __contains__(self, key: object) -> bool:
        return key in self._places  # Mapping's own version would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
