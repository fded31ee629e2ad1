"""Experts' adapters in PEFT: one for each parameter that holds all experts of a block.

Such an adapter (peft/tuners/lora/layer.py, ParamWrapper) has lora_A (experts · rank, in), expert
after expert, and lora_B (out, rank · experts), with the experts side by side within each rank. Gate
and up are one parameter: the two adapters of an expert use consecutive ranks, and their B have
separate rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.models.names import HFWeight, Rows

# PEFT's name for the module that it wraps.
INNER = ".base_layer"

# The parameters that hold all experts of a block, in the order in which PEFT wraps their module:
# the order of transformers' classes, in which down_proj comes last and so is outermost.
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass
class Stack:
    """The adapters of one parameter's experts.

    Attributes:
        weight: the place of one of the experts.
        experts: how many there are.
        shape: (out, in) of an expert's part of the parameter.
        parts: how many parts the parameter's rows have: 2 for gate and up.
        adapters: by (rows, expert): A (rank, in) and scale · B (out, rank), float32.
    """

    weight: HFWeight
    experts: int
    shape: tuple[int, int]
    parts: int
    adapters: dict[tuple[Rows | None, int], tuple[mx.array, mx.array]] = field(default_factory=dict)

    def least_rank(self) -> int:
        """The smallest rank that holds every expert's parts."""
        ranks = [0] * self.experts
        for (_, expert), (a, _) in self.adapters.items():
            ranks[expert] += a.shape[0]
        return max(ranks)

    def tensors(self, rank: int) -> tuple[mx.array, mx.array]:
        """lora_A (experts · rank, in) and lora_B (out, rank · experts), padded with zeros."""
        out_features, in_features = self.shape
        a = mx.zeros((self.experts, rank, in_features))
        b = mx.zeros((self.experts, self.parts * out_features, rank))
        used = [0] * self.experts
        for (rows, expert), (a_part, b_part) in self.adapters.items():
            ranks = slice(used[expert], used[expert] + a_part.shape[0])
            a[expert, ranks] = a_part
            b[expert, rows.slice(b.shape[1]) if rows else slice(None), ranks] = b_part
            used[expert] = ranks.stop
        return a.reshape(-1, in_features), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def expert_stacks(adapter: Adapter, places: Mapping[str, HFWeight]) -> dict[str, Stack]:
    """The adapter's experts by the full name of their parameter; empty if none is a target.

    Args:
        adapter: the adapter, with MLX's module names.
        places: where each of its modules is in Hugging Face's model.
    """
    stacks: dict[str, Stack] = {}
    for name, module in adapter.plan.modules.items():
        weight = places[name]
        if not weight.parameter:
            continue
        shape = (module.out_features, module.in_features)
        parts = 2 if weight.rows else 1
        stack = stacks.setdefault(
            f"{weight.module}.{weight.parameter}", Stack(weight, 0, shape, parts)
        )
        stack.experts = max(stack.experts, weight.number + 1)
        if module.rank:
            a = adapter.tensors[f"{name}.lora_a"].T.astype(mx.float32)
            b = module.scale * adapter.tensors[f"{name}.lora_b"].T.astype(mx.float32)
            stack.adapters[weight.rows, weight.number] = a, b
    return stacks


def stacked_tensors(stacks: Mapping[str, Stack], rank: int | None) -> dict[str, mx.array]:
    """The tensors of adapters of experts, by PEFT's keys.

    Args:
        stacks: from ``expert_stacks``.
        rank: the rank of all of them; None: the smallest that each allows.
    """
    tensors = {}
    for stack in stacks.values():
        key = f"base_model.model.{stack.weight.module}"
        # PEFT wraps a module once for each of its parameters; down_proj comes last, so outermost.
        if stack.weight.parameter != "down_proj" and f"{stack.weight.module}.down_proj" in stacks:
            key += INNER
        a, b = stack.tensors(rank or stack.least_rank())
        tensors[f"{key}.lora_A.weight"] = a
        tensors[f"{key}.lora_B.weight"] = b
    return tensors


def split_stacks(
    tensors: Mapping[str, mx.array], parameters: Collection[str], rank_of: Callable[[str], int]
) -> dict[str, mx.array]:
    """Split adapters of experts' parameters into one adapter per expert.

    Args:
        tensors: ``NAME.lora_a`` (in, experts · rank) and ``NAME.lora_b`` (rank · experts, out) of
            experts, by PEFT's names, and those of linear layers.
        parameters: the configuration's ``target_parameters``: names, or their ends.
        rank_of: the rank of an expert's adapter, by the full name of the parameter.

    Returns:
        The tensors, of experts as ``MODULE.PARAMETER.NUMBER``: A (in, rank) and B (rank, out). A
        stack that does not fit its rank is left as it is.
    """
    split = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        module = name
        while module.endswith(INNER):
            module = module.removesuffix(INNER)
        depth = (len(name) - len(module)) // len(INNER)
        wrapped = [
            parameter
            for parameter in PARAMETERS
            if any(f".{module}.{parameter}".endswith(f".{target}") for target in parameters)
        ]
        stacked = tensor.shape[-1] if kind == "lora_a" else tensor.shape[0]
        parameter = f"{module}.{wrapped[-1 - depth]}" if depth < len(wrapped) else None
        rank = rank_of(parameter) if parameter else 0
        if not rank or tensor.ndim != 2 or stacked % rank:
            split[key] = tensor
            continue
        for e in range(stacked // rank):
            part = tensor[e :: stacked // rank]
            if kind == "lora_a":
                part = tensor[:, e * rank : (e + 1) * rank]
            split[f"{parameter}.{e}.{kind}"] = part
    return split


def stack_module(weight: HFWeight, keys: Collection[str]) -> str:
    """The module name under which a file with these keys stores an expert's adapter."""
    inner = f"{weight.module}{INNER}"
    is_inner = weight.parameter != "down_proj" and f"base_model.model.{inner}.lora_A.weight" in keys
    return inner if is_inner else weight.module


def expert_part(
    weight: HFWeight, a: np.ndarray, b: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """One expert's A (rank, in) and B (its rows, rank), cut from what ``Stack.tensors`` made."""
    experts = len(a) // rank
    part = b[:, weight.number :: experts]
    rows = weight.rows.slice(len(b)) if weight.rows else slice(None)
    return a[weight.number * rank : (weight.number + 1) * rank], part[rows]
