"""The two layouts of a PEFT adapter: one of one rank and scale, and one of exact ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.peft_experts import expert_stacks, stacked_tensors
from tlora_mlx.errors import UserError
from tlora_mlx.models.families import FAMILIES
from tlora_mlx.models.names import HFWeight

# Ranks that vLLM has kernels for (vllm/config/lora.py, MaxLoRARanks).
PORTABLE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def _hf_names(places: Mapping[str, HFWeight]) -> dict[str, str]:
    """MLX module name -> Hugging Face module name, for all target modules except experts."""
    return {name: weight.module for name, weight in places.items() if not weight.parameter}


def targets_and_parameters(
    adapter: Adapter, hf_names: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Split modules into those that PEFT targets as modules and as parameters; both sorted."""
    as_parameters = FAMILIES[adapter.model_type].as_parameters
    modules, parameters = [], []
    for name in sorted(hf_names):
        if name.rsplit(".", 1)[-1] in as_parameters:
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return modules, parameters


def tensor_keys(hf_name: str) -> tuple[str, str]:
    """The keys of a module's A and B."""
    prefix = f"base_model.model.{hf_name}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def portable(
    adapter: Adapter, places: Mapping[str, HFWeight]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and configuration of the portable layout.

    Args:
        adapter: the adapter, with MLX's module names.
        places: where each of its modules is in Hugging Face's model.
    """
    names, stacks = _hf_names(places), expert_stacks(adapter, places)
    largest = max(
        *(adapter.plan.modules[name].rank for name in names),
        *(stack.least_rank() for stack in stacks.values()),
        0,
    )
    if largest > PORTABLE_RANKS[-1]:
        raise UserError(
            f"the plan's largest rank {largest} is above {PORTABLE_RANKS[-1]}, the most that vLLM "
            "serves; use --layout compact, or train with --max-rank 512"
        )
    rank = next(r for r in PORTABLE_RANKS if r >= largest)
    tensors = {}
    for name in names:
        module = adapter.plan.modules[name]
        a, b = mx.zeros((rank, module.in_features)), mx.zeros((module.out_features, rank))
        if module.rank:
            a[: module.rank] = adapter.tensors[f"{name}.lora_a"].T.astype(mx.float32)
            b[:, : module.rank] = module.scale * adapter.tensors[f"{name}.lora_b"].T.astype(
                mx.float32
            )
        tensors |= zip(tensor_keys(names[name]), (a, b), strict=True)
    tensors |= stacked_tensors(stacks, rank)
    modules, parameters = targets_and_parameters(adapter, names.values())
    parameters += sorted(stacks)
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in modules})
    config = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": suffixes,
        "target_parameters": parameters or None,
    }
    family = FAMILIES[adapter.model_type]
    found = [re.match(r"(.+?)\.(\d+)\.", name) for name in [*names.values(), *stacks]]
    prefix, blocks = found[0][1], {int(match[2]) for match in found}
    if family.others and prefix == family.hf_blocks:
        config["exclude_modules"] = family.others
    if min(blocks) > 0:
        # Only the last blocks (--num-layers): otherwise PEFT would adapt the others too.
        pattern = prefix.rsplit(".", 1)[-1]
        config |= {"layers_to_transform": sorted(blocks), "layers_pattern": pattern}
    return tensors, config


def compact(
    adapter: Adapter, places: Mapping[str, HFWeight]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and configuration of the compact layout; the arguments are ``portable``'s."""
    names = {name: hf for name, hf in _hf_names(places).items() if adapter.plan.modules[name].rank}
    tensors, ranks, alphas = {}, {}, {}
    for name in names:
        module = adapter.plan.modules[name]
        a_key, b_key = tensor_keys(names[name])
        tensors[a_key] = adapter.tensors[f"{name}.lora_a"].T
        tensors[b_key] = adapter.tensors[f"{name}.lora_b"].T
        # PEFT matches r"(.*\.)?(key)$": anchored and escaped, to tell layers.1 from layers.11.
        [[target]] = filter(None, targets_and_parameters(adapter, [names[name]]))
        pattern = f"^{re.escape(target)}$"
        ranks[pattern] = module.rank
        alphas[pattern] = module.scale * module.rank
    stacks = expert_stacks(adapter, places)
    stacks = {name: stack for name, stack in stacks.items() if stack.least_rank()}
    for name, stack in stacks.items():
        pattern = f"^{re.escape(name)}$"
        ranks[pattern] = alphas[pattern] = stack.least_rank()
    tensors |= stacked_tensors(stacks, None)
    modules, parameters = targets_and_parameters(adapter, names.values())
    parameters += sorted(stacks)
    return tensors, {
        "r": adapter.plan.rank,
        "lora_alpha": adapter.plan.alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": modules,
        "target_parameters": parameters or None,
    }
