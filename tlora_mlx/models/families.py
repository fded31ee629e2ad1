"""The model families: linear layers' names in mlx-lm and in Hugging Face models, as data.

Longer than 300 lines, since it is one table that grows with every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


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
        hf_blocks: the same in the transformers model that the checkpoint is for. Multimodal
            checkpoints are for the whole model, with the towers beside the language model, and
            vLLM and SGLang load it as such.
        text_blocks: the same in transformers' class of the language model alone, if the checkpoint
            is multimodal and there is such a class.
        text_is_auto: ``AutoModelForCausalLM`` loads the language model alone from it.
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
    text_blocks: str | None = None
    text_is_auto: bool = False
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

    @property
    def in_file(self) -> str:
        """What comes before a block's number in the checkpoint."""
        return self.file_blocks or self.hf_blocks

    @property
    def is_multimodal(self) -> bool:
        """Whether transformers' model has the language model as a part."""
        return "language_model" in self.hf_blocks.split(".")


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

_STACKED_EXPERTS = Experts(stacks={"gate_up_proj": "gate_up_proj", "down_proj": "down_proj"})
_GEMMA4_EXPERTS = replace(
    _STACKED_EXPERTS, switch="experts.switch_glu", module="experts", file="experts"
)
_GEMMA4 = _LLAMA | {name: name for name in ("per_layer_input_gate", "per_layer_projection")}
_DELTA = _same("linear_attn: in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj")

# Where the language model is in most multimodal models.
_MULTIMODAL: dict[str, Any] = {
    "blocks": "language_model.model.layers",
    "hf_blocks": "model.language_model.layers",
    "text_blocks": "model.layers",
}
_NO_TEXT_CLASS: dict[str, Any] = {"text_blocks": None}
_TOWERS = r"model\.(vision|audio)_\w+\..*"

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
            "iquestcoder",
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
    **dict.fromkeys(
        ("gemma3", "llava"),
        Family(_LLAMA, **_MULTIMODAL, file_blocks="language_model.model.layers", others=_TOWERS),
    ),
    "mistral3": Family(  # of mistral, ministral3 and mistral4
        _LLAMA | _LATENT | _Q | _SHARED_EXPERTS,
        **_MULTIMODAL,
        file_blocks="language_model.model.layers",
        others=_TOWERS,
        experts=_STACKED_EXPERTS,
    ),
    "gemma4": Family(_GEMMA4, **_MULTIMODAL, experts=_GEMMA4_EXPERTS, others=_TOWERS),
    "gemma4_text": Family(_GEMMA4, experts=_GEMMA4_EXPERTS),
    "gemma4_unified": Family(_LLAMA, **_MULTIMODAL),
    "qwen3_vl": Family(_LLAMA, **(_MULTIMODAL | _NO_TEXT_CLASS)),
    "qwen3_vl_moe": Family(
        _LLAMA,
        **(_MULTIMODAL | _NO_TEXT_CLASS),
        experts=replace(_STACKED_EXPERTS, transposed=True),
        as_parameters=_LEGACY_EXPERT_NAMES,
    ),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl"),
        Family(
            _LLAMA,
            **(_MULTIMODAL | _NO_TEXT_CLASS),
            file_blocks="model.layers",
            others=r"model\.visual\..*",
        ),
    ),
    "muse_glimmer": Family(
        _LLAMA | _same("self_attn: gate_proj"),
        **(_MULTIMODAL | _NO_TEXT_CLASS | {"blocks": "model.layers"}),
        others=_TOWERS,
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
    "qwen3_5": Family(_LLAMA | _DELTA, **_MULTIMODAL, text_is_auto=True),
    "qwen3_5_moe": Family(
        _ATTENTION | _DELTA | _SHARED_EXPERT,
        **_MULTIMODAL,
        text_is_auto=True,
        experts=_STACKED_EXPERTS,
    ),
    "olmo_hybrid": Family(
        _LLAMA | _same("linear_attn: q_proj k_proj v_proj a_proj b_proj g_proj o_proj")
    ),
    "recurrent_gemma": Family(
        _same(
            "temporal_block: q_proj k_proj v_proj o_proj linear_x linear_y linear_out",
            "mlp_block: gate_proj up_proj down_proj",
        )
    ),
    **dict.fromkeys(
        ("mamba", "falcon_mamba"),
        Family(
            _same("mixer: in_proj x_proj"),
            blocks="backbone.layers",
            hf_blocks="backbone.layers",
            refused={
                "mixer.out_proj": _NO_OUT_PROJ,
                "mixer.dt_proj": "transformers takes the weight of dt_proj, past any adapter",
            },
        ),
    ),
    "mamba2": Family(
        _same("mixer: in_proj"),
        blocks="backbone.layers",
        hf_blocks="backbone.layers",
        refused={"mixer.out_proj": _NO_OUT_PROJ},
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
    "solar_open": Family(
        _ATTENTION | _SHARED_EXPERTS, experts=Experts(), as_parameters=_LEGACY_EXPERT_NAMES
    ),
    "mimo_v2_flash": Family(_LLAMA, experts=Experts(), as_parameters=_LEGACY_EXPERT_NAMES),
    "minimax_m2": Family(_ATTENTION, experts=replace(_MIXTRAL_EXPERTS, module="mlp.experts")),
    "minimax_m3_vl": Family(
        _ATTENTION,
        **(_MULTIMODAL | _NO_TEXT_CLASS),
        file_blocks="language_model.model.layers",
        refused=dict.fromkeys(
            ("gate_proj", "up_proj", "down_proj"),
            "transformers has the gate_proj and up_proj of MLPs as one matrix",
        ),
        others=_TOWERS,
    ),
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa"),
        Family(
            _LATENT | _MLP | _SHARED_EXPERTS,
            experts=Experts(),
            as_parameters=_LEGACY_EXPERT_NAMES,
        ),
    ),
    "kimi_k25": Family(
        _LATENT | _MLP | _SHARED_EXPERTS,
        **_MULTIMODAL,
        file_blocks="language_model.model.layers",
        experts=Experts(),
        as_parameters=_LEGACY_EXPERT_NAMES,
        others=_TOWERS,
    ),
    "kimi_linear": Family(
        _same("self_attn: q_proj k_proj v_proj b_proj g_a_proj g_b_proj o_proj")
        | _same("self_attn: kv_a_proj_with_mqa")
        | _MLP
        | _SHARED_EXPERTS
        | {f"self_attn.f_{x}_proj": f"self_attn.forget_gate.f_{x}_proj" for x in "ab"},
        files={f"self_attn.forget_gate.f_{x}_proj": f"self_attn.f_{x}_proj" for x in "ab"}
        | {name: name.replace("mlp", "block_sparse_moe") for name in _SHARED_EXPERTS},
        experts=Experts(file="block_sparse_moe.experts", files=("w1", "w3", "w2")),
    ),
    "longcat_flash": Family(
        _same(
            "self_attn.0: q_a_proj q_b_proj kv_a_proj_with_mqa o_proj",
            "self_attn.1: q_a_proj q_b_proj kv_a_proj_with_mqa o_proj",
            "mlps.0: gate_proj up_proj down_proj",
            "mlps.1: gate_proj up_proj down_proj",
        ),
        refused=dict.fromkeys(
            _same("mlp.switch_mlp: gate_proj up_proj down_proj"),
            "transformers counts the experts without weights among those of gate_up_proj, but not "
            "among those of down_proj",
        ),
        as_parameters=_LEGACY_EXPERT_NAMES,
    ),
    "llama4_text": Family(_ATTENTION | _same("feed_forward: gate_proj up_proj down_proj")),
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
        **(_MULTIMODAL | {"hf_blocks": "language_model.model.layers"}),
        text_is_auto=True,
        others=r"vision_model\..*",
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

# Every other model_type of mlx-lm 0.32.2, and why no export of it could be right, or be proven.
_NO_CLASS = "transformers 5.24 has no class for it, so no export can be compared with its model"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "Klear",
            "afm7",
            "baichuan_m1",
            "bailing_moe",
            "bailing_moe_linear",
            "bailing_moe_v3",
            "deepseek",
            "deepseek_v41",
            "deepseek_v41_text",
            "gear",
            "hunyuan",
            "internlm2",
            "iquestloopcoder",
            "joyai_llm_flash",
            "kimi_k2",
            "kimi_k3",
            "kimi_vl",
            "lille-130m",
            "longcat_flash_ngram",
            "mimo",
            "minicpm",
            "nanbeige",
            "nemotron-nas",
            "openelm",
            "phi-msft",
            "phi3small",
            "phixtral",
            "plamo",
            "plamo2",
            "plamo3",
            "prism_hadamard_qwen35",
            "qwen",
            "rwkv7",
            "spark2_5",
            "talkie",
            "telechat3",
            "xverse",
            "youtu_llm",
        ),
        _NO_CLASS,
    ),
    "bailing_hybrid": "mlx-lm has two models of this name, and transformers a third, whose "
    "config.json neither of the two reads",
    "bitnet": "mlx-lm reads packed ternary weights alone, in layers of their own kind",
    "dbrx": "mlx-lm evaluates its routers in the middle of the model, which then has no gradient",
    "gemma3n": "without a cache, as in training, mlx-lm's last layers compute keys and values of "
    "their own instead of those that they share, so an adapter would be trained on a different "
    "model than it is used with",
    "glm": "mlx-lm rotates whole heads, transformers only the part given by partial_rotary_factor, "
    "so an adapter would be trained on a different model than it is used with",
    "jamba": "mlx-lm makes the weights of a token's experts add up to 1, transformers does not",
    "lfm2-vl": "transformers knows this model as lfm2_vl, which mlx-lm does not, so neither loads "
    "what the other does",
    "minimax": "mlx-lm loads it as minimax_m2, transformers as the older model with lightning "
    "attention",
    "mistral4": "transformers loads it only as mistral3's language model",
    "muse_spark": "mlx-lm makes one matrix of the queries', keys', values' and gates' projections, "
    "with rows in another order",
    "nanochat": "mlx-lm reads nanochat's own tensor names, not those of transformers",
    "olmo": "mlx-lm reads the older format of the package ai2-olmo alone",
    "pixtral": "transformers has a class for its vision tower alone; newer checkpoints are llava's",
    "step3p5": "transformers 5.24 has its configuration, but no class for it",
}
