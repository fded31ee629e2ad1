"""PEFT's LoRA adapters, and what their configuration says about each pair of matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tlora_mlx.adapters.adapter import Adapter, is_number, is_rank, plan_of
from tlora_mlx.adapters.delta import Delta, float32
from tlora_mlx.adapters.format import CONFIG, AdapterFormat
from tlora_mlx.adapters.peft_experts import PARAMETERS, expert_part, split_stacks, stack_module
from tlora_mlx.adapters.peft_layouts import (
    compact,
    portable,
    targets_and_parameters,
    tensor_keys,
)
from tlora_mlx.adapters.peft_patterns import patterns_of
from tlora_mlx.adapters.proof import Proof, cast_finite, prove_adapter
from tlora_mlx.errors import UserError
from tlora_mlx.method.experts import stack_and_number
from tlora_mlx.models.families import FAMILIES
from tlora_mlx.models.names import HFWeight, MLXPart, hf_weight, mlx_parts
from tlora_mlx.storage.files import Finish, new_directory, read_json, write_json
from tlora_mlx.storage.foreign import file_in
from tlora_mlx.storage.safetensors import TensorFile, read_tensors, write_tensors

ADAPTERS = "adapter_model.safetensors"
LAYOUTS = {"portable": portable, "compact": compact}
NAMES = ("multimodal", "text")

TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# Options that make an adapter more than scale · B A, or put it on more than linear layers
# (huggingface/peft, tuners/lora/config.py).
MORE_THAN_LORA = (
    "use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices",
    "layer_replication", "alora_invocation_tokens", "monteclora_config", "use_bdlora",
    "arrow_config", "kasa_config",
)  # fmt: skip

# Initialisations that change the base's weights, which the file lacks (…/lora/layer.py).
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftFormat(AdapterFormat):
    """An adapter directory for ``PeftModel.from_pretrained``."""

    name = "peft"
    title = "PEFT LoRA adapter"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Check for the key that every PEFT configuration has."""
        return "peft_type" in config

    def read(self, directory: Path, config: Mapping[str, Any]) -> Adapter:
        """Read plain LoRA on linear layers and experts, with tensors that match its ranks.

        ``fan_in_fan_out`` is ignored: it says how the base stores W, and A and B are as usual. An
        expert's module is named ``MODULE.PARAMETER.NUMBER``.
        """
        _refuse_more_than_lora(directory, config)
        path = file_in(directory, ADAPTERS)
        if not path.exists() and (directory / "adapter_model.bin").exists():
            raise UserError(
                f"the PEFT adapter {directory} is a pickle file, adapter_model.bin, which can run "
                "code; if you trust it, load it with PEFT and save it again with save_pretrained"
            )
        rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)  # PEFT's defaults
        if not is_rank(rank) or not is_number(alpha):
            raise UserError(f"the PEFT adapter {directory} has no 'r' and 'lora_alpha' above 0")
        ranks, alphas = patterns_of(directory, config)
        tensors, unknown = {}, []
        for key, value in read_tensors(path, "the PEFT adapter").items():
            if found := TENSOR.fullmatch(key):
                tensors[f"{found[1]}.lora_{found[2].lower()}"] = value.T
            else:
                unknown.append(key)
        if unknown:
            raise UserError(
                f"the PEFT adapter {path} has tensors that are not LoRA matrices "
                f"of a linear layer: {', '.join(sorted(unknown))}"
            )

        parameters = config.get("target_parameters") or []
        tensors = split_stacks(tensors, parameters, lambda name: ranks.of(name, rank))

        def target(module: str) -> str:
            """The name that PEFT matches patterns with: the parameter's, if that is the target."""
            weight = f"{module}.weight"
            is_parameter = any(f".{weight}".endswith(f".{p}") for p in parameters)
            return weight if is_parameter else stack_and_number(module)[0]

        def scale_of(module: str, of_tensor: int) -> float:
            over = math.sqrt(of_tensor) if config.get("use_rslora") else of_tensor
            return alphas.of(target(module), alpha) / over

        plan = plan_of(path, tensors, rank, alpha, scale_of)
        differing = [
            f"{name} has rank {module.rank}, but {expected} in the configuration"
            for name, module in plan.modules.items()
            if module.rank != (expected := ranks.of(target(name), rank))
        ]
        if differing:
            raise UserError(f"the PEFT adapter {directory} is inconsistent: {'; '.join(differing)}")
        base = config.get("base_model_name_or_path")
        base = base if isinstance(base, str) and base else None
        return Adapter(plan, tensors, self.name, directory, config, original=base)

    def write(
        self,
        adapter: Adapter,
        output: Path,
        dtype: str = "float32",
        base_model: str | None = None,
        layout: str = "portable",
        names: str = "multimodal",
        *,
        finish: Finish | None = None,
    ) -> Proof:
        """Write an adapter for PEFT and, in the portable layout, for every reader of its format.

        ``portable``: every module is padded with zeros to one rank R, ``r = lora_alpha = R``, and
        its scale is folded into B in float32, so that each reader's formula (``lora_alpha / r``, or
        ``lora_alpha`` over the tensor's rank) gives 1. Modules of rank 0 are zeros, so that no
        reader misses one. ``compact``: exact ranks with ``rank_pattern`` and ``alpha_pattern``,
        which PEFT, transformers and vLLM from 0.32 read; modules of rank 0 are left out.

        For multimodal checkpoints, ``names`` says which class's names the adapter gets:
        ``multimodal``, of the whole model, which vLLM, SGLang and ``AutoModelForImageTextToText``
        load; or ``text``, of its language model alone.

        Raises:
            UserError: in addition, the family or a module has no known Hugging Face name, the
                original of a quantized base is unknown, a rank exceeds 512 (portable), or the
                family has no such ``names``.
        """
        base_model = adapter.base_on_hugging_face(
            base_model, "name the full-precision Hub repository with --base-model"
        )
        if layout not in LAYOUTS:
            raise UserError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
        places = _places(adapter, names)
        tensors, ranks = LAYOUTS[layout](adapter, places)
        tensors = cast_finite(tensors, dtype)
        config = {
            "base_model_name_or_path": base_model,
            "bias": "none",
            # For Conv1D's weights (in, out): PEFT transposes what it merges, not A and B.
            "fan_in_fan_out": FAMILIES[adapter.model_type].transposed,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
            **ranks,
        }
        with new_directory(output, finish) as staging:
            write_tensors(staging / ADAPTERS, tensors, {"format": "pt"})
            write_json(staging / CONFIG, config)
            return _prove(adapter, places, staging, dtype, output)

    def mlx_parts(self, adapter: Adapter, model_type: str) -> dict[str, list[MLXPart]]:
        """Convert from the names of transformers."""
        return {name: mlx_parts(model_type, name) for name in adapter.plan.modules}


PEFT = PeftFormat()


def _refuse_more_than_lora(path: Path, config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise UserError(f"{path} is a PEFT adapter of type {config['peft_type']}, not LORA")
    used = [key for key in MORE_THAN_LORA if config.get(key)]
    if (bias := config.get("bias", "none")) != "none":
        used.append(f"bias {bias}")
    parameters = config.get("target_parameters") or []
    can_be_read = {"weight", *PARAMETERS}
    if not isinstance(parameters, list) or not all(
        str(p).rpartition(".")[2] in can_be_read for p in parameters
    ):
        used.append("target_parameters other than linear layers' weights and experts")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        used.append(
            f"init_lora_weights {start} (PEFT's save_pretrained converts it to plain LoRA with "
            "path_initial_model_for_weight_conversion)"
        )
    if used:
        raise UserError(
            f"the PEFT adapter {path} is more than LoRA matrices on linear layers, and nothing "
            f"else is supported: it uses {', '.join(used)}"
        )


def _places(adapter: Adapter, names: str) -> dict[str, HFWeight]:
    """Where each module is in the class whose names the adapter gets."""
    if names not in NAMES:
        raise UserError(f"names {names!r} are none of {', '.join(NAMES)}")
    text = names == "text"
    if text and not FAMILIES[adapter.model_type].text_blocks:
        raise UserError(
            f"--names text does nothing for family '{adapter.model_type}', of which transformers "
            "has no language model as part of a multimodal one; leave it out"
        )
    return {name: hf_weight(adapter.model_type, name, text) for name in adapter.plan.modules}


def _prove(
    adapter: Adapter, places: Mapping[str, HFWeight], path: Path, dtype: str, output: Path
) -> Proof:
    """Read the adapter back as PEFT does: lora_alpha over r, unless a pattern matches."""
    config = read_json(path / CONFIG, "the adapter's configuration")
    ranks, alphas = patterns_of(path, config)
    tensors = TensorFile(path / ADAPTERS, "the adapter")

    @lru_cache(maxsize=4)  # all experts of a block share one pair
    def factor(key: str) -> np.ndarray:
        return float32(tensors[key])

    def delta(name: str) -> Delta | None:
        weight = places[name]
        target, module = weight.module, weight.module
        if weight.parameter:
            target, module = f"{module}.{weight.parameter}", stack_module(weight, tensors.keys())
        else:
            [[target]] = filter(None, targets_and_parameters(adapter, [module]))
        keys = tensor_keys(module)
        if not set(keys) <= tensors.keys():
            return None
        rank = ranks.of(target, config["r"])
        a, b = map(factor, keys)
        if weight.parameter:
            a, b = expert_part(weight, a, b, rank)
        return (
            Delta(alphas.of(target, config["lora_alpha"]) / rank * b, a) if len(a) == rank else None
        )

    return prove_adapter(adapter, delta, dtype, output)
