"""The model families: linear layers' names in mlx-lm and in Hugging Face models, as data.

Longer than 300 lines, since it is one table that grows with every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Experts:
    """Where a family's experts are inside a block.

    Attributes:
        switch: mlx-lm's stacked layers.
        module: the transformers module whose parameters hold all experts.
        file: the module that holds them in the checkpoint.
        files: the names of an expert's matrices there, in the order of ``projections``.
        stacks: if experts are stacked in the checkpoint too, their tensors' names inside ``file``,
            by transformers' parameter.
        projections: for each of mlx-lm's names, transformers' parameter, such as ``gate_up_proj``
            (experts, 2·F, in), and which part of its rows.
        interleaved: gate and up rows alternate in ``gate_up_proj``; otherwise all of gate come
            first.
        transposed: the checkpoint's stacks are (experts, in, out).
    """

    switch: str = "mlp.switch_mlp"
    module: str = "mlp.experts"
    file: str = "mlp.experts"
    files: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    projections: Mapping[str, tuple[str, int | None]] = field(
        default_factory=lambda: {
            "gate_proj": ("gate_up_proj", 0),
            "up_proj": ("gate_up_proj", 1),
            "down_proj": ("down_proj", None),
        }
    )
    interleaved: bool = False
    stacks: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` of config.json names the linear layers inside its blocks.

    Attributes:
        linears: from the path inside a block in MLX to the path in transformers.
        blocks: what comes before a block's number in MLX.
        hf_blocks: the same in transformers' model.
        file_blocks: the same in the checkpoint, if it differs from ``hf_blocks``.
        files: from transformers' path inside a block to the checkpoint's, where they differ.
        transposed: the weights are Conv1D's, (in, out).
        experts: where the experts are, if they can be exported.
        refused: why some paths inside a block (MLX's) cannot be exported.
        as_parameters: last name components of layers that PEFT must be given as parameters.
        others: regular expression for transformers modules outside the language model whose last
            name component may equal a target's.
    """

    linears: Mapping[str, str]
    blocks: str = "model.layers"
    hf_blocks: str = "model.layers"
    file_blocks: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    experts: Experts | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    as_parameters: frozenset[str] = frozenset()
    others: str | None = None

    def __post_init__(self) -> None:
        files = {self.files.get(name, name) for name in self.linears.values()}
        if not len(self.linears) == len(set(self.linears.values())) == len(files):
            raise ValueError(f"two modules of {self} have the same name")


def _same(*paths: str) -> dict[str, str]:
    """Modules whose path inside a block is the same on both sides: ``prefix: name name …``."""
    split = [path.split(": ") for path in paths]
    return {f"{p}.{name}": f"{p}.{name}" for p, names in split for name in names.split()}


_ATTENTION = _same("self_attn: q_proj k_proj v_proj o_proj")
_MLP = _same("mlp: gate_proj up_proj down_proj")
_LLAMA = _ATTENTION | _MLP

# Multi-head latent attention; kv_b_proj is not a target where mlx-lm splits it.
_LATENT = _same("self_attn: q_a_proj q_b_proj kv_a_proj_with_mqa o_proj")
_Q = _same("self_attn: q_proj")  # instead of q_a_proj and q_b_proj if there is no q_lora_rank
_KV_B = _same("self_attn: kv_b_proj")
_SHARED_EXPERT = _same("mlp.shared_expert: gate_proj up_proj down_proj")
_SHARED_EXPERTS = _same("mlp.shared_experts: gate_proj up_proj down_proj")
_MAMBA = _same("mamba: in_proj out_proj")
_GRANITE_EXPERTS = Experts(
    "block_sparse_moe.switch_mlp",
    "block_sparse_moe.experts",
    "block_sparse_moe",
    stacks={"gate_up_proj": "input_linear.weight", "down_proj": "output_linear.weight"},
)
_MIXTRAL_EXPERTS = Experts(
    "block_sparse_moe.switch_mlp", file="block_sparse_moe.experts", files=("w1", "w3", "w2")
)

# peft/tuners/tuners_utils.py, _check_lora_target_modules_mamba.
_NO_OUT_PROJ = "PEFT refuses the out_proj of this family's Mamba layers, whose kernels bypass it"
_EXAONE_FILES = {
    "self_attn.q_proj": "attn.attention.q_proj",
    "self_attn.k_proj": "attn.attention.k_proj",
    "self_attn.v_proj": "attn.attention.v_proj",
    "self_attn.o_proj": "attn.attention.out_proj",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
}

# PEFT (0.21) mistakes these names for those that experts had in transformers 4, in every family
# whose experts transformers converts like qwen2_moe's (_MOE_TARGET_MODULE_MAPPING in
# peft/utils/transformers_weight_conversion.py; _MODEL_TO_CONVERSION_PATTERN in
# transformers/conversion_mapping.py).
_LEGACY_EXPERT_NAMES = frozenset({"gate_proj", "up_proj", "down_proj"})

# By config.json's model_type. Each is verified by a round trip through mlx-lm, transformers and
# PEFT (tests/models/test_families.py; docs/MODELS.md lists the results).
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "ministral3",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "olmo2",
            "olmo3",
            "smollm3",
            "cohere",
            "cohere2",
            "granite",
            "stablelm",
            "exaone4",
            "ernie4_5",
            "helium",
            "hunyuan_v1_dense",
            "seed_oss",
            "internlm3",
        ),
        Family(_LLAMA),
    ),
    "apertus": Family(_ATTENTION | _same("mlp: up_proj down_proj")),
    "nemotron": Family(_ATTENTION | _same("mlp: up_proj down_proj")),
    "starcoder2": Family(_ATTENTION | _same("mlp: c_fc c_proj")),
    "phi": Family(_same("self_attn: q_proj k_proj v_proj dense", "mlp: fc1 fc2")),
    # Fused: the adapter is for the fused matrix, on both sides.
    "phi3": Family(_same("self_attn: qkv_proj o_proj", "mlp: gate_up_proj down_proj")),
    "glm4": Family(_ATTENTION | _same("mlp: gate_up_proj down_proj")),
    "minicpm3": Family(_LATENT | _KV_B | _MLP),
    "gpt_neox": Family(
        _same("attention: query_key_value dense", "mlp: dense_h_to_4h dense_4h_to_h"),
        blocks="model.h",
        hf_blocks="gpt_neox.layers",
    ),
    "gptj": Family(
        _same("attn: q_proj k_proj v_proj out_proj", "mlp: fc_in fc_out"),
        blocks="model.h",
        hf_blocks="transformer.h",
    ),
    "gpt_bigcode": Family(
        _same("attn: c_attn c_proj", "mlp: c_fc c_proj"),
        blocks="transformer.h",
        hf_blocks="transformer.h",
    ),
    # The Hub's checkpoints omit "transformer."; mlx-lm does not load any others.
    "gpt2": Family(
        _same("attn: c_attn c_proj", "mlp: c_fc c_proj"),
        blocks="model.h",
        hf_blocks="transformer.h",
        file_blocks="h",
        transposed=True,
    ),
    "exaone": Family(
        {mlx: hf for hf, mlx in _EXAONE_FILES.items()},
        blocks="transformer.h",
        file_blocks="transformer.h",
        files=_EXAONE_FILES,
    ),
    # The language model inside a multimodal one.
    "gemma3": Family(
        _LLAMA,
        blocks="language_model.model.layers",
        hf_blocks="model.language_model.layers",
        file_blocks="language_model.model.layers",
        others=r"model\.vision_tower\..*",
    ),
    # Mixed kinds of layers: state spaces, convolutions or linear attention among the others.
    "falcon_h1": Family(
        _ATTENTION | _same("mamba: in_proj", "feed_forward: gate_proj up_proj down_proj"),
        refused={"mamba.out_proj": _NO_OUT_PROJ},
    ),
    "lfm2": Family(
        _same(
            "self_attn: q_proj k_proj v_proj out_proj",
            "conv: in_proj out_proj",
            "feed_forward: w1 w2 w3",
        )
    ),
    # On the Hub inside a multimodal model, of which transformers loads only the language model.
    "qwen3_5": Family(
        _LLAMA | _same("linear_attn: in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj"),
        blocks="language_model.model.layers",
        file_blocks="model.language_model.layers",
    ),
    # Mixtures of experts: attention and whatever all tokens use; experts where they are given.
    "granitemoe": Family(_ATTENTION, experts=_GRANITE_EXPERTS),
    "gpt_oss": Family(
        _ATTENTION,
        experts=Experts(
            "mlp.experts",
            interleaved=True,
            stacks={"gate_up_proj": "gate_up_proj", "down_proj": "down_proj"},
            transposed=True,
        ),
    ),
    **dict.fromkeys(("mixtral", "phimoe"), Family(_ATTENTION, experts=_MIXTRAL_EXPERTS)),
    **dict.fromkeys(("olmoe", "mellum"), Family(_ATTENTION, experts=Experts())),
    "qwen3_moe": Family(_LLAMA, experts=Experts(), as_parameters=_LEGACY_EXPERT_NAMES),
    "qwen2_moe": Family(_ATTENTION | _SHARED_EXPERT, experts=Experts()),
    "qwen3_next": Family(
        _LLAMA | _SHARED_EXPERT | _same("linear_attn: in_proj_qkvz in_proj_ba out_proj"),
        experts=Experts(),
        as_parameters=_LEGACY_EXPERT_NAMES,
    ),
    **dict.fromkeys(
        ("glm4_moe", "ernie4_5_moe", "exaone_moe"),
        Family(_LLAMA | _SHARED_EXPERTS, experts=Experts(), as_parameters=_LEGACY_EXPERT_NAMES),
    ),
    "dots1": Family(
        _LLAMA | _SHARED_EXPERTS, experts=Experts("mlp.experts"), as_parameters=_LEGACY_EXPERT_NAMES
    ),
    "afmoe": Family(
        _LLAMA | _SHARED_EXPERTS | _same("self_attn: gate_proj"),
        experts=Experts("mlp.experts"),
        as_parameters=_LEGACY_EXPERT_NAMES,
    ),
    "laguna": Family(
        _LLAMA | _same("self_attn: g_proj"),
        refused=dict.fromkeys(
            _SHARED_EXPERT,
            "PEFT 0.21 finds no adapter for shared_experts in this family, since transformers 5.24 "
            "renames them while loading",
        ),
    ),
    "deepseek_v2": Family(
        _LATENT | _Q | _KV_B | _MLP | _SHARED_EXPERTS,
        experts=Experts(),
        as_parameters=_LEGACY_EXPERT_NAMES,
    ),
    **dict.fromkeys(
        ("deepseek_v3", "glm4_moe_lite"),
        Family(
            _LATENT | _Q | _MLP | _SHARED_EXPERTS,
            experts=Experts(),
            as_parameters=_LEGACY_EXPERT_NAMES,
        ),
    ),
    "llama4": Family(
        _ATTENTION
        | _same(
            "feed_forward: gate_proj up_proj down_proj",
            "feed_forward.shared_expert: gate_proj up_proj down_proj",
        ),
        refused=dict.fromkeys(
            _same("feed_forward.experts: gate_proj up_proj down_proj"),
            "PEFT 0.21 reads this family's experts, which are (in, out), as (out, in)",
        ),
        blocks="language_model.model.layers",
        file_blocks="language_model.model.layers",
    ),
    "lfm2_moe": Family(
        _same("self_attn: q_proj k_proj v_proj out_proj", "conv: in_proj out_proj")
        | {
            "feed_forward.gate_proj": "feed_forward.w1",
            "feed_forward.down_proj": "feed_forward.w2",
            "feed_forward.up_proj": "feed_forward.w3",
        },
        experts=Experts(
            "feed_forward.switch_mlp",
            "feed_forward.experts",
            "feed_forward.experts",
            ("w1", "w3", "w2"),
        ),
    ),
    "granitemoehybrid": Family(
        _ATTENTION | _MAMBA | _same("shared_mlp: input_linear output_linear"),
        experts=_GRANITE_EXPERTS,
    ),
    "nemotron_h": Family(
        _same(
            "mixer: in_proj q_proj k_proj v_proj o_proj up_proj down_proj",
            "mixer.shared_experts: up_proj down_proj",
        ),
        experts=Experts(
            "mixer.switch_mlp",
            "mixer.experts",
            "mixer.experts",
            ("up_proj", "down_proj"),
            {"fc1": ("up_proj", None), "fc2": ("down_proj", None)},
        ),
        refused={"mixer.out_proj": _NO_OUT_PROJ},
        blocks="backbone.layers",
        file_blocks="backbone.layers",
    ),
}

# Families that mlx-lm loads as a different model than transformers does: no export could be right.
REFUSED = {
    "glm": "mlx-lm rotates whole heads, transformers only the part given by partial_rotary_factor, "
    "so an adapter would be trained on a different model than it is used with",
}
