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
        hub: what config.json has on the Hub and mlx-lm asks for, but transformers 5 leaves out.
        note: where mlx-lm and transformers differ.
        released: settings of released checkpoints with which they do, which ``settings`` avoid.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    released: dict[str, Any] = field(default_factory=dict)


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
}

# Families of which one side or the other is not what a checkpoint on the Hub asks for.
FAILS = {
    "glm": Tiny(
        {"head_dim": 12},
        note="mlx-lm rotates whole heads, transformers the half that partial_rotary_factor says",
    ),
    "olmo": Tiny(note="mlx-lm reads the older format of the package ai2-olmo alone"),
    "nanochat": Tiny(note="mlx-lm reads nanochat's own tensor names, not those of transformers"),
    "bitnet": Tiny(note="mlx-lm trains BitNet's packed ternary weights not at all"),
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
        note="mlx-lm computes other logits than transformers",
    ),
}
