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
        renames: regular expressions of tensors' names in the checkpoints that transformers 5
            writes, and what they are on the Hub.
        experts_on_hub: "stacked" if experts are stacked there, but not by transformers 5; "(in,
            out)" if both stack them, but the Hub the other way round.
        mlx_drops: regular expression of tensors that only transformers reads: for mlx-lm there is a
            conversion without them.
        note: where mlx-lm and transformers differ.
        released: settings of released checkpoints with which they do, which ``settings`` avoid.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    renames: dict[str, str] = field(default_factory=dict)
    experts_on_hub: str = ""
    mlx_drops: str = ""
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
INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 4096}
MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 2, 2],
        "mrope_interleaved": True,
    }
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
}
KIMI_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
}
# Everything that the releases of Gemma 4 have, in one: inputs of their own for each layer, layers
# that share keys and values, keys that are values, wider layers, experts.
GEMMA4 = {
    **COMMON,
    "head_dim": 12,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 64,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 300,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 30.0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
GLOBAL_HEADS = {"global_head_dim": 16, "num_global_key_value_heads": 1}
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
    "llava": Tiny(
        {
            "text_config": {**COMMON, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
        }
    ),
    "gemma4_text": Tiny(GEMMA4, hub=GLOBAL_HEADS),
    "gemma4": Tiny(
        {
            "text_config": {**GEMMA4, "model_type": "gemma4_text"},
            "vision_config": {
                **VISION,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "position_embedding_size": 16,
            },
            "audio_config": None,
        },
        hub={"vocab_size": 300, "text_config": GLOBAL_HEADS},
    ),
    "gemma4_unified": Tiny(
        {
            "text_config": {
                **COMMON,
                **SLIDING,
                "model_type": "gemma4_unified_text",
                "head_dim": 12,
                "global_head_dim": 16,
            }
        },
        hub={
            "vocab_size": 300,
            "text_config": {
                **GLOBAL_HEADS,
                "hidden_size_per_layer_input": 0,
                "num_kv_shared_layers": 0,
            },
        },
    ),
    "mistral3": Tiny(
        {
            "text_config": {**COMMON, **ROUTED, **LATENT, "model_type": "mistral4"},
            "vision_config": {**VISION, "model_type": "pixtral"},
            "tie_word_embeddings": False,
        }
    ),
    "qwen2_vl": Tiny(
        {
            "text_config": {**COMMON, **MROPE, "model_type": "qwen2_vl_text"},
            "vision_config": {
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 48,
                "num_heads": 2,
                "mlp_ratio": 1,
            },
        }
    ),
    "qwen2_5_vl": Tiny(
        {
            "text_config": {**COMMON, **MROPE, "model_type": "qwen2_5_vl_text"},
            "vision_config": QWEN_VISION,
        }
    ),
    "qwen3_vl": Tiny(
        {
            "text_config": {**COMMON, **MROPE, "head_dim": 12, "model_type": "qwen3_vl_text"},
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        }
    ),
    "muse_glimmer": Tiny(
        {
            "text_config": {**COMMON, **SLIDING, "head_dim": 12, "model_type": "muse_glimmer_text"},
            "vision_config": KIMI_VISION,
            "out_hidden_size": 48,
            "projector_hidden_size": 16,
        },
        mlx_drops=r"model\.vision_",
        note="mlx-lm loads conversions without the vision tower",
    ),
    "iquestcoder": Tiny(),
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
    "gpt2": Tiny(GPT, renames={r"^transformer\.": ""}),
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
            "vision_config": QWEN_VISION,
        }
    ),
    "olmo_hybrid": Tiny(
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        renames={
            "attention_layer_norm": "input_layernorm",
            "feedforward_layer_norm": "post_attention_layernorm",
        },
        note="mlx-lm reads checkpoints whose norms have the names of transformers' modules alone",
    ),
    "recurrent_gemma": Tiny(
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "attention_window_size": 64,
            "rms_norm_eps": 1e-5,
        },
        note="transformers always rounds the factor of the embeddings to bfloat16, mlx-lm only in "
        "bfloat16 models; most of mlx-lm's norms have an epsilon of 1e-5, whatever config.json "
        "says",
        released={"hidden_size": 48, "rms_norm_eps": 1e-6},
    ),
    "mamba": Tiny(
        {"state_size": 8, "time_step_rank": 4, "intermediate_size": 96},
        targets=["in_proj", "x_proj"],
        note="without out_proj, which PEFT refuses, and dt_proj, whose weight transformers takes "
        "past any adapter",
    ),
    "falcon_mamba": Tiny(
        {"state_size": 8, "time_step_rank": 4, "intermediate_size": 96},
        targets=["in_proj", "x_proj"],
        note="as mamba",
    ),
    "mamba2": Tiny(
        {"num_heads": 8, "head_dim": 12, "state_size": 8, "n_groups": 1},
        hub={"intermediate_size": 96, "time_step_limit": [0.0, 1e9]},
        targets=["in_proj"],
        note="without out_proj, which PEFT refuses",
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
    "qwen3_5_moe": Tiny(
        {
            "text_config": {
                **COMMON,
                **DELTA,
                **EXPERTS,
                "model_type": "qwen3_5_moe_text",
                "shared_expert_intermediate_size": 40,
            },
            "vision_config": QWEN_VISION,
        },
        experts_on_hub="stacked",
    ),
    "qwen3_vl_moe": Tiny(
        {
            "text_config": {
                **COMMON,
                **EXPERTS,
                **MROPE,
                "model_type": "qwen3_vl_moe_text",
                "head_dim": 12,
                "mlp_only_layers": [0],
                "tie_word_embeddings": False,
            },
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        },
        hub={"text_config": {"norm_topk_prob": True}},
        experts_on_hub="(in, out)",
    ),
    "minimax_m2": Tiny(
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12},
        hub={"rotary_dim": 12, "shared_intermediate_size": 0},
    ),
    "minimax_m3_vl": Tiny(
        {
            "text_config": {
                **COMMON,
                "model_type": "minimax_m3_vl_text",
                "head_dim": 12,
                "rotary_dim": 12,
                "dense_intermediate_size": 80,
                "shared_intermediate_size": 32,
                "intermediate_size": 32,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["full_attention", "full_attention"],
            },
            "vision_config": VISION,
            "projector_hidden_size": 16,
        },
        targets=["q_proj", "k_proj", "v_proj", "o_proj"],
        note="without the MLPs, whose gate_proj and up_proj are one matrix in transformers",
    ),
    "mimo_v2_flash": Tiny(
        {
            "head_dim": 12,
            "v_head_dim": 8,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 65,
            "layer_types": ["full_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {
                kind: {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                }
                for kind in ("full_attention", "sliding_attention")
            },
        },
        hub={
            "hybrid_layer_pattern": [0, 1],
            "moe_layer_freq": [0, 1],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": 64,
            "n_shared_experts": None,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "layernorm_epsilon": 1e-5,
            "rope_theta": 10000.0,
            "swa_rope_theta": 10000.0,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 12,
            "swa_v_head_dim": 8,
            "partial_rotary_factor": 0.5,
        },
    ),
    "solar_open": Tiny(
        {**ROUTED, "head_dim": 12},
        hub={
            "first_k_dense_replace": 0,
            "intermediate_size": 80,
            "partial_rotary_factor": 1.0,
            "use_qk_norm": False,
        },
    ),
    "deepseek_v32": Tiny({**ROUTED, **LATENT, **INDEXER, "n_group": 2, "topk_group": 1}),
    "glm_moe_dsa": Tiny(
        {**ROUTED, **LATENT, **INDEXER},
        hub={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    ),
    "kimi_k25": Tiny(
        {
            "text_config": {**COMMON, **ROUTED, **LATENT, "model_type": "deepseek_v3"}
            | {"n_group": 2, "topk_group": 1, "tie_word_embeddings": False},
            "vision_config": KIMI_VISION,
            "projection_hidden_size": 16,
            "tie_word_embeddings": False,
        },
        renames={
            r"^language_model\.model\.blocks": "language_model.model.layers",
            r"^model\.mm_projector": "mm_projector",
        },
    ),
    "kimi_linear": Tiny(
        {
            **LATENT,
            "q_lora_rank": None,
            "moe_intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "linear_head_dim": 32,
            "linear_num_heads": 2,
        },
        hub={
            "linear_attn_config": {
                "kda_layers": [1, 3],
                "full_attn_layers": [2],
                "num_heads": 2,
                "head_dim": 32,
                "short_conv_kernel_size": 4,
            },
            "num_experts": 4,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "model_max_length": 256,
            "rope_theta": 10000.0,
            "mla_use_nope": True,
            "first_k_dense_replace": 1,
            "head_dim": 20,
            "num_expert_group": 1,
        },
        renames={r"block_sparse_moe\.(gate|up|down)_proj": r"mlp.\1_proj"},
    ),
    "longcat_flash": Tiny(
        {
            "num_layers": 2,
            "ffn_hidden_size": 80,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "head_dim": 8,
            "v_head_dim": 12,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 32,
            "num_key_value_heads": 4,
        },
        hub={
            "attention_method": "MLA",
            "zero_expert_type": "identity",
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "rope_theta": 10000000.0,
        },
        mlx_drops=r".*\.experts\.[45]\.",
        note="mlx-lm reads checkpoints without weights of the experts that have none, transformers "
        "5.24 those with them",
    ),
    "llama4_text": Tiny(
        {
            "head_dim": 12,
            "intermediate_size_mlp": 80,
            "num_local_experts": 4,
            "moe_layers": [],
            "attention_chunk_size": 128,
            "tie_word_embeddings": True,
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
    "mistral3": {"text_config": {**COMMON, "head_dim": 12, "model_type": "mistral"}},
    "deepseek_v2": {"q_lora_rank": 16},
    "deepseek_v3": {"q_lora_rank": None},
    "glm4_moe_lite": {"q_lora_rank": None},
    "qwen3_next": {"mlp_only_layers": [0]},
}

# Families of which one side or the other is not what a checkpoint on the Hub asks for.
FAILS = {
    "glm": Tiny({"head_dim": 12}),
    "olmo": Tiny(),
    "nanochat": Tiny(),
    "bitnet": Tiny(),
    "minimax": Tiny({"num_local_experts": 4, "head_dim": 12}),
    "jamba": Tiny(
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_dt_rank": 4,
            "mamba_d_state": 8,
        }
    ),
}
