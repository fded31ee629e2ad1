"""A tiny model of every family: what docs/MODELS.md is about.

Each entry is the settings of a random checkpoint that transformers makes, as small as the family
lets it be, with layers of every kind that it has.
"""

from dataclasses import dataclass, field
from typing import Any

COMMON = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
GPT = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Tiny:
    """The settings of a family's tiny checkpoint.

    Attributes:
        settings: what differs from ``COMMON`` in the configuration of transformers.
        targets: the target modules, where not all can be exported.
        hub: what config.json has on the Hub and mlx-lm asks for, but transformers 5 leaves out.
        note: where mlx-lm and transformers differ.
        released: settings of released checkpoints with which they do, which ``settings`` avoid.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    targets: list[str] | None = None
    note: str = ""
    released: dict[str, Any] = field(default_factory=dict)


MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,  # a multiple of 32, for which mlx-lm has Metal kernels
    "linear_value_head_dim": 8,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
# sqrt(hidden_size) is a number of bfloat16 with 64.
GEMMA3 = {"hidden_size": 64, "head_dim": 12, "query_pre_attn_scalar": 12, **SLIDING}

FAMILIES = {
    "llama": Tiny(),
    "mistral": Tiny({"sliding_window": None}),
    "ministral3": Tiny({"head_dim": 12}),
    "qwen2": Tiny({"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen3": Tiny({"head_dim": 12}),
    "gemma": Tiny(
        {"head_dim": 12, "hidden_act": "gelu_python"},
        note="mlx-lm computes the exact GELU where released checkpoints have its approximation",
        released={"hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma2": Tiny({"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 64}),
    "gemma3_text": Tiny(
        GEMMA3,
        note="mlx-lm rounds the embeddings' factor sqrt(hidden_size) to bfloat16, transformers "
        "to the model's dtype",
        released={"hidden_size": 48},
    ),
    "gemma3": Tiny(
        {
            "text_config": {**COMMON, **GEMMA3, "model_type": "gemma3_text"},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
        note="as gemma3_text",
    ),
    "phi": Tiny(),
    "phi3": Tiny(),
    "olmo2": Tiny(),
    "olmo3": Tiny(SLIDING),
    "smollm3": Tiny({"no_rope_layers": [1, 0]}),
    "glm4": Tiny({"head_dim": 12, "attention_bias": True}),
    "starcoder2": Tiny(
        {"hidden_act": "gelu"},
        note="mlx-lm computes the exact GELU where released checkpoints have its approximation",
        released={"hidden_act": "gelu_pytorch_tanh"},
    ),
    "cohere": Tiny(),
    "cohere2": Tiny(SLIDING),
    "granite": Tiny(),
    "stablelm": Tiny({"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "apertus": Tiny(hub={"mlp_bias": False, "post_norm": False, "qk_norm": True}),
    "exaone": Tiny(),
    "exaone4": Tiny({"head_dim": 12, **SLIDING}, hub={"sliding_window_pattern": "LG"}),
    "ernie4_5": Tiny({"head_dim": 12}),
    "helium": Tiny({"head_dim": 12}),
    "hunyuan_v1_dense": Tiny({"head_dim": 12}),
    "internlm3": Tiny({"head_dim": 12}),
    "nemotron": Tiny({"head_dim": 12}),
    "seed_oss": Tiny({"head_dim": 12}),
    "gpt2": Tiny(GPT),
    "gpt_bigcode": Tiny(
        {**GPT, "n_inner": 80, "activation_function": "gelu"},
        note="mlx-lm computes the exact GELU where released checkpoints have its approximation",
        released={"activation_function": "gelu_pytorch_tanh"},
    ),
    "gpt_neox": Tiny(
        {"intermediate_size": 192, "rotary_pct": 0.5, "hidden_act": "gelu_fast"},
        note="mlx-lm approximates GELU where released checkpoints have the exact one",
        released={"hidden_act": "gelu"},
    ),
    "gptj": Tiny({**GPT, "rotary_dim": 8}),
    "minicpm3": Tiny(
        {**LATENT, "v_head_dim": 64, "hidden_size": 256},
        hub={"rope_scaling": {"original_max_position_embeddings": 256}},
    ),
    "falcon_h1": Tiny(
        {"head_dim": 12, "mamba_d_ssm": 48, "mamba_d_head": 12, **MAMBA},
        targets=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "in_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        note="without Mamba's out_proj, which PEFT refuses",
    ),
    "lfm2": Tiny(
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        hub={
            "block_dim": 48,
            "block_multiple_of": 1,
            "block_ffn_dim_multiplier": 1.0,
        },
    ),
    "qwen3_5": Tiny(
        {
            "text_config": {**COMMON, **DELTA, "model_type": "qwen3_5_text"},
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 48,
                "num_position_embeddings": 16,
            },
        }
    ),
    # Mixtures of experts.
    "mixtral": Tiny({"num_local_experts": 4, "sliding_window": None}),
    "olmoe": Tiny({"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": Tiny(
        {
            "num_local_experts": 4,
            "lm_head_bias": True,
            "attention_bias": True,
            "sliding_window": None,
        }
    ),
    "granitemoe": Tiny({"num_local_experts": 4}),
    "qwen2_moe": Tiny({**EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": Tiny({**EXPERTS, "head_dim": 12, "mlp_only_layers": [0]}),
    "qwen3_next": Tiny(
        {
            **EXPERTS,
            **DELTA,
            "shared_expert_intermediate_size": 40,
            "linear_key_head_dim": 128,  # for the packed kernel
        }
    ),
    "mellum": Tiny({**EXPERTS, "head_dim": 12}),
    "dots1": Tiny(ROUTED),
    "glm4_moe": Tiny({**ROUTED, "head_dim": 12}),
    "deepseek_v2": Tiny({**ROUTED, **LATENT, "q_lora_rank": None, "rope_parameters": YARN}),
    "deepseek_v3": Tiny({**ROUTED, **LATENT, "n_group": 2, "topk_group": 1}),
    "glm4_moe_lite": Tiny({**ROUTED, **LATENT}),
    "ernie4_5_moe": Tiny(
        {
            "moe_intermediate_size": 32,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
        }
    ),
    "exaone_moe": Tiny(
        {
            **EXPERTS,
            **SLIDING,
            "head_dim": 12,
            "num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"],
        },
        hub={"is_moe_layer": [False, True]},
    ),
    "afmoe": Tiny(
        {**EXPERTS, **SLIDING, "head_dim": 12, "num_dense_layers": 1, "num_shared_experts": 1},
        hub={"num_dense_layers": 1},
    ),
    "laguna": Tiny(
        {**EXPERTS, "head_dim": 12, "shared_expert_intermediate_size": 40},
        targets=["q_proj", "k_proj", "v_proj", "o_proj", "g_proj"],
        note="without the MLPs: PEFT 0.21 loses the adapters of shared experts",
    ),
    "lfm2_moe": Tiny({**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": Tiny(
        {
            **MAMBA,
            "mamba_d_head": 24,
            "position_embedding_type": "rope",
            "shared_intermediate_size": 40,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["mamba", "attention"],
        },
        hub={"layer_types": ["mamba", "attention"]},
    ),
    "nemotron_h": Tiny(
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "head_dim": 12,
            "mamba_num_heads": 4,
            "mamba_head_dim": 12,
            "ssm_state_size": 8,
            "n_groups": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 40,
        },
        targets=["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj"],
        note="without Mamba's out_proj, which PEFT refuses",
    ),
    "llama4": Tiny(
        {
            "text_config": {
                **COMMON,
                "model_type": "llama4_text",
                "num_hidden_layers": 4,
                "head_dim": 12,
                "intermediate_size_mlp": 64,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 128,
            },
            "vision_config": {
                **VISION,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
        }
    ),
    "gpt_oss": Tiny(
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**YARN, "truncate": True},
            **SLIDING,
        },
        note="mlx-lm rounds YaRN's bounds, released checkpoints (truncate: false) do not",
        released={"rope_parameters": {**YARN, "truncate": False}},
    ),
}
# Settings by which these have the layers that their tiny models have not.
VARIANTS = {
    "deepseek_v2": {"q_lora_rank": 16},
    "deepseek_v3": {"q_lora_rank": None},
    "glm4_moe_lite": {"q_lora_rank": None},
    "qwen3_next": {"mlp_only_layers": [0]},
}
# Whose checkpoints are of the multimodal model, and AutoModelForCausalLM loads a part of.
MULTIMODAL = {"qwen3_5", "llama4"}

# Families of which one side or the other is not what a checkpoint on the Hub asks for.
FAILS = {
    "glm": Tiny(
        {"head_dim": 12},
        note="mlx-lm rotates whole heads, transformers the half that partial_rotary_factor says",
    ),
    "olmo": Tiny(note="mlx-lm reads the older format of the package ai2-olmo alone"),
    "nanochat": Tiny(note="mlx-lm reads nanochat's own tensor names, not those of transformers"),
    "bitnet": Tiny(note="mlx-lm reads packed ternary weights alone, in layers of their own kind"),
    "jamba": Tiny(
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_dt_rank": 4,
            "mamba_d_state": 8,
        },
        note="mlx-lm makes the weights of a token's experts add up to 1, transformers does not",
    ),
}
