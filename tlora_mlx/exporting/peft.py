"""A run as a PEFT adapter, in a layout that every reader gets right or in PEFT's own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tlora_mlx.errors import UserError
from tlora_mlx.exporting.delta import Delta, float32
from tlora_mlx.exporting.experts import expert_part, expert_stacks, stack_module, stacked_tensors
from tlora_mlx.exporting.names import FAMILIES, hf_weight, unexportable
from tlora_mlx.exporting.proof import DTYPES, Proof, finite_in, prove_adapter
from tlora_mlx.files import new_directory, read_json, write_json, write_tensors
from tlora_mlx.run_directory import Run
from tlora_mlx.tensor_file import TensorFile
from tlora_mlx.terminal import say

# Ranks that vLLM has kernels for (vllm/config/lora.py, MaxLoRARanks).
PORTABLE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
CONFIG = "adapter_config.json"
ADAPTERS = "adapter_model.safetensors"


def export_peft(
    run: Run,
    output: Path,
    layout: str = "portable",
    dtype: str = "float32",
    base_model: str | None = None,
) -> Path:
    """Write a run as a directory that ``PeftModel.from_pretrained`` loads.

    ``portable``: every module is padded with zeros to one rank R, ``r = lora_alpha = R``, and its
    scale is folded into B in float32, so that each reader's formula (``lora_alpha / r``, or over
    the tensor's rank) gives 1. Modules of rank 0 are zeros, so that no reader misses one.
    ``compact``: exact ranks with ``rank_pattern`` and ``alpha_pattern``, which PEFT alone reads;
    modules of rank 0 are left out.

    Args:
        run: what ``read_run`` read.
        output: directory to make; must not exist, or be empty.
        layout: ``portable`` or ``compact``.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.
        base_model: the ``base_model_name_or_path`` for readers; the run's own where it is None.

    Returns:
        ``output``.

    Raises:
        UserError: the family or a module has no known Hugging Face name, the original of a
            quantized base is not known, the largest rank is above 512 (portable), a value
            overflows ``dtype``, or ``output`` is taken.
        RunError: it could not be written, or not as it should be; nothing is left of it.
    """
    if reason := unexportable(run.config["model_type"], run.plan.modules):
        raise UserError(f"cannot export {run.path}: {reason}")
    base_model = base_model or run.config.get("base_model")
    if not base_model:
        raise UserError(
            f"the base model {run.config['model']} is quantized and its card names no original; "
            "name the full-precision Hub repository with --base-model"
        )
    family = FAMILIES[run.config["model_type"]]
    write = {"portable": _portable, "compact": _compact}[layout]
    tensors, config = write(run, DTYPES[dtype])
    finite_in(tensors, dtype)
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        # Of Conv1D's weights (in, out): PEFT transposes what it merges, A and B are stored alike.
        "fan_in_fan_out": family.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        **config,
    }
    with new_directory(output) as beside:
        write_tensors(beside / ADAPTERS, tensors, {"format": "pt"})
        write_json(beside / CONFIG, config)
        say(_prove(run, beside, dtype).summary())
    return output


def _hf_names(run: Run) -> dict[str, str]:
    """MLX module name -> Hugging Face module name, of all target modules but experts."""
    model_type = run.config["model_type"]
    weights = {name: hf_weight(model_type, name) for name in run.plan.modules}
    return {name: weight.module for name, weight in weights.items() if not weight.parameter}


def _targets(run: Run, hf_names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Which of these modules PEFT is told of as modules, and the weights of the others; sorted."""
    as_parameters = FAMILIES[run.config["model_type"]].as_parameters
    modules, parameters = [], []
    for name in sorted(hf_names):
        if name.rsplit(".", 1)[-1] in as_parameters:
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return modules, parameters


def _keys(hf_name: str) -> tuple[str, str]:
    prefix = f"base_model.model.{hf_name}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _portable(run: Run, dtype: mx.Dtype) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and configuration of the portable layout."""
    names, stacks = _hf_names(run), expert_stacks(run)
    largest = max(
        *(run.plan.modules[name].rank for name in names),
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
        module = run.plan.modules[name]
        a, b = mx.zeros((rank, module.in_features)), mx.zeros((module.out_features, rank))
        if module.rank:
            a[: module.rank] = run.tensors[f"{name}.lora_a"].T.astype(mx.float32)
            b[:, : module.rank] = module.scale * run.tensors[f"{name}.lora_b"].T.astype(mx.float32)
        for key, value in zip(_keys(names[name]), (a, b), strict=True):
            tensors[key] = value.astype(dtype)
    tensors |= stacked_tensors(stacks, rank, dtype)
    modules, parameters = _targets(run, names.values())
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
    family = FAMILIES[run.config["model_type"]]
    if family.others:
        config["exclude_modules"] = family.others
    prefix = family.hf_blocks
    blocks = {
        int(name.removeprefix(f"{prefix}.").split(".")[0]) for name in [*names.values(), *stacks]
    }
    if min(blocks) > 0:
        # The last blocks alone (--num-layers): PEFT would make adapters in the others too.
        pattern = prefix.rsplit(".", 1)[-1]
        config |= {"layers_to_transform": sorted(blocks), "layers_pattern": pattern}
    return tensors, config


def _compact(run: Run, dtype: mx.Dtype) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and configuration of the compact layout."""
    names = {name: hf for name, hf in _hf_names(run).items() if run.plan.modules[name].rank}
    tensors, ranks, alphas = {}, {}, {}
    for name in names:
        module = run.plan.modules[name]
        a_key, b_key = _keys(names[name])
        tensors[a_key] = run.tensors[f"{name}.lora_a"].T.astype(dtype)
        tensors[b_key] = run.tensors[f"{name}.lora_b"].T.astype(dtype)
        # PEFT matches r"(.*\.)?(key)$": anchored and escaped, so that layers.1 is not layers.11's.
        [[target]] = filter(None, _targets(run, [names[name]]))
        pattern = f"^{re.escape(target)}$"
        ranks[pattern] = module.rank
        alphas[pattern] = module.scale * module.rank
    stacks = {name: stack for name, stack in expert_stacks(run).items() if stack.least_rank()}
    for name, stack in stacks.items():
        pattern = f"^{re.escape(name)}$"
        ranks[pattern] = alphas[pattern] = stack.least_rank()
    tensors |= stacked_tensors(stacks, None, dtype)
    modules, parameters = _targets(run, names.values())
    parameters += sorted(stacks)
    return tensors, {
        "r": run.plan.rank,
        "lora_alpha": run.plan.alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": modules,
        "target_parameters": parameters or None,
    }


def _prove(run: Run, path: Path, dtype: str) -> Proof:
    """Read the adapter back by PEFT's rule: lora_alpha over r, unless a pattern matches."""
    config = read_json(path / CONFIG, "the adapter's configuration")
    tensors = TensorFile(path / ADAPTERS, "the adapter")

    def setting(key: str, name: str) -> float:
        # peft/utils/other.py, get_pattern_key: the first pattern that matches wins.
        patterns = config[f"{key}_pattern"].items()
        found = (value for k, value in patterns if re.match(rf"(.*\.)?({k})$", name))
        return next(found, config["r" if key == "rank" else "lora_alpha"])

    @lru_cache(maxsize=4)  # all experts of a block are in one pair
    def factor(key: str) -> np.ndarray:
        return float32(tensors[key])

    def delta(name: str) -> Delta | None:
        weight = hf_weight(run.config["model_type"], name)
        target, module = weight.module, weight.module
        if weight.parameter:
            target, module = f"{module}.{weight.parameter}", stack_module(weight, tensors.keys())
        else:
            [[target]] = filter(None, _targets(run, [module]))
        keys = _keys(module)
        if not set(keys) <= tensors.keys():
            return None
        rank = int(setting("rank", target))
        a, b = map(factor, keys)
        if weight.parameter:
            a, b = expert_part(weight, a, b, rank)
        return Delta(setting("alpha", target) / rank * b, a) if len(a) == rank else None

    return prove_adapter(run, delta, dtype)
