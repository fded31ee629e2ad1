"""What each reader of PEFT's format does, as data: with the version that it was tried with, and the
source that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reader:
    """A reader of PEFT's format.

    Attributes:
        name: its name, with the versions that the rule is for.
        tried: the version that was tried, and what of it: run whole, or its classes alone.
        source: repository and file of the rule.
        patterns: ``rank_pattern`` and ``alpha_pattern`` are honoured.
        over_tensor: ``lora_alpha`` is divided by the tensor's own rank, not the configuration's.
        rslora: ``use_rslora`` is honoured.
        one_rank: all tensors must have the configuration's rank.
        names_only: ``target_modules`` must be a list of names.
        whole_kinds: a kind of module that is missing from one block is dropped in all.
        binds: regular expression of the module names that it binds (``re.search``); it drops the
            others.
        binds_in: the same as ``binds``, for the families that it loads as a class whose modules
            have other names.
        without: the families for which it loads no adapter.
        unknown: the families that it cannot load at all.
        experts: how it refuses adapters of experts; None if it does not.
        experts_in: the families in which it loads them all the same.
    """

    name: str
    tried: str
    source: str
    patterns: bool = False
    over_tensor: bool = False
    rslora: bool = True
    one_rank: bool = False
    names_only: bool = False
    whole_kinds: bool = False
    binds: str = ""
    binds_in: Mapping[str, str] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    experts: str | None = None
    experts_in: frozenset[str] = frozenset()


# vllm/model_executor/models: each wrapper class's hf_to_vllm_mapper, by which adapters are renamed
# before their names are looked up; those of gemma4, mistral3 and qwen2_vl take both spellings.
_WRAPPED = r"^(model\.language_model|language_model\.model)\."
_VLLM = Reader(
    "vLLM from 0.32",
    "0.32.0, run",
    "vllm-project/vllm vllm/lora/peft_helper.py, model_manager.py, model_executor/models",
    patterns=True,
    binds_in={
        **dict.fromkeys(("gemma3", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"), _WRAPPED),
        "llama4": r"^language_model\.model\.",
    },
    # Whose classes do not inherit SupportsLoRA.
    without=frozenset(
        {"falcon_mamba", "gemma3n", "gpt2", "gptj", "kimi_k25", "kimi_linear", "kimi_vl", "mamba"}
        | {"mamba2", "mimo_v2_flash", "minimax_m3_vl", "stablelm", "step3p5"}
    ),
    # Of the families without a class, its backend for transformers' takes those with attention in
    # every layer, unless an earlier version had a class for them (model_executor/models/registry.py
    # and transformers/base.py).
    unknown=frozenset({"dots1", "recurrent_gemma"}),
    # Its refusal names both (model_manager.py, _validate_moe_lora_format).
    experts="refuses experts, unless set up as in tlora_mlx's docs/MODELS.md",
    experts_in=frozenset({"gpt_oss", "qwen3_5_moe", "qwen3_vl_moe"}),  # is_3d_moe_weight
)

READERS = (
    Reader("PEFT, transformers", "0.21.2, 5.24.0, run", "huggingface/peft", patterns=True),
    _VLLM,
    Reader(
        "vLLM before 0.32",
        "0.31.0, run",
        _VLLM.source,
        binds_in=_VLLM.binds_in,
        without=_VLLM.without | {"gpt_neox"},
        unknown=_VLLM.unknown,
        experts=_VLLM.experts,
        experts_in=_VLLM.experts_in,
    ),
    Reader(
        "SGLang",
        "0.5.23, its classes",
        "sgl-project/sglang python/sglang/srt/lora/lora.py, mem_pool.py",
        rslora=False,
        one_rank=True,
        names_only=True,
        binds=r"\blayers\.\d+\..*\D$",  # an expert's name ends in its number
    ),
    Reader(
        "llama.cpp",
        "0.4.0, run",
        "ggml-org/llama.cpp convert_lora_to_gguf.py, src/llama-adapter.h",
        over_tensor=True,
        rslora=False,
        # Its converter transposes A and B with gpt2's weights; the class for Mistral 3 writes the
        # base model instead of the adapter (conversion/mistral3.py).
        without=frozenset({"gpt2", "ministral3", "mistral3"}),
        unknown=frozenset({"gptj", "helium", "longcat_flash", "olmo_hybrid", "recurrent_gemma"}),
        experts="refuses experts",
    ),
    Reader(
        "TGI",
        "3.3.7, its classes",
        "huggingface/text-generation-inference server/text_generation_server/utils/adapter.py, "
        "adapters/lora.py",
        one_rank=True,
        whole_kinds=True,
        binds=r"^model\.layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj"
        r"|mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj))$",
    ),
)
