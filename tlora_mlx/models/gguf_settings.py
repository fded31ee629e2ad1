"""A model's settings as GGUF metadata, after llama.cpp's converter.

Sources: ggml-org/llama.cpp ``conversion/base.py`` (``TextModel.set_gguf_parameters``) and the
families' own files beside it, as of libllama 0.4.0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tlora_mlx.errors import UserError
from tlora_mlx.models.llama_cpp import WAY_ROUND, LlamaCppModel
from tlora_mlx.storage.gguf_file import gguf_package

if TYPE_CHECKING:
    from gguf import GGUFWriter

# From transformers' setting to the writer's method.
_PLAIN = {
    "num_hidden_layers": "add_block_count",
    "max_position_embeddings": "add_context_length",
    "hidden_size": "add_embedding_length",
    "intermediate_size": "add_feed_forward_length",
    "num_attention_heads": "add_head_count",
    "num_key_value_heads": "add_head_count_kv",
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "num_local_experts": "add_expert_count",
    "num_experts": "add_expert_count",
    "num_experts_per_tok": "add_expert_used_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
}

# Settings that llama.cpp assumes, without a place in the file, by architecture.
_ASSUMED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu"},
    "qwen2": {"use_sliding_window": False},
    "qwen2moe": {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3": {"use_sliding_window": False, "attention_bias": False},
    "qwen3moe": {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "smollm3": {"use_sliding_window": False},
    "gemma3": {"attn_logit_softcapping": None},
}
# Settings with one value per layer: all the same but for every so many, by architecture.
_PATTERNS = {
    "gemma2": ("layer_types", 2, "sliding_attention", "full_attention"),
    "gemma3": ("layer_types", 6, "sliding_attention", "full_attention"),
    "smollm3": ("no_rope_layers", 4, 1, 0),
}


def add_settings(writer: GGUFWriter, model: LlamaCppModel) -> dict[str, np.ndarray]:
    """Add the settings of a model to a GGUF file.

    Returns:
        The tensors, float32 by name, that hold settings: RoPE's factors.

    Raises:
        UserError: llama.cpp would compute another model, or a kind of RoPE is not known.
    """
    config, architecture = model.config, model.family.architecture
    _check_assumptions(config, architecture, model.model_type)
    for setting, method in _PLAIN.items():
        if config.get(setting) is not None:
            getattr(writer, method)(config[setting])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config["vocab_size"])
    window = config.get("sliding_window")
    if architecture == "phi3":  # 0 distinguishes Phi-4
        writer.add_sliding_window(window or 0)
    elif architecture in ("gemma2", "gemma3") and window:
        writer.add_sliding_window(window)
    return _add_rope(writer, config, head, architecture)


def _check_assumptions(config: dict[str, Any], architecture: str, model_type: str) -> None:
    wrong = [
        f"{name} is {config[name]!r}, not {value!r}"
        for name, value in _ASSUMED.get(architecture, {}).items()
        if name in config and config[name] != value
    ]
    layers = range(config["num_hidden_layers"])
    if architecture in _PATTERNS:
        setting, period, rest, last = _PATTERNS[architecture]
        wanted = [rest if (i + 1) % period else last for i in layers]
        if config[setting] != wanted:
            wrong.append(f"{setting} is not {last!r} in every {period}th layer alone")
    if architecture in ("gemma2", "gemma3"):
        head, whole = config["head_dim"], config["hidden_size"] // config["num_attention_heads"]
        scaled = whole if len(layers) in (46, 62) else head  # the 27B models
        if config["query_pre_attn_scalar"] != scaled:
            wrong.append(
                f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}, not {scaled}"
            )
    if wrong:
        raise UserError(
            f"llama.cpp would compute a different model of family '{model_type}': "
            f"{'; '.join(wrong)}; export it with --format merged for another reader"
        )


def _add_rope(
    writer: GGUFWriter, config: dict[str, Any], head: int, architecture: str
) -> dict[str, np.ndarray]:
    """RoPE's settings; returns the tensors of its factors."""
    gguf = gguf_package()
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    rotated = int(head * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(rotated)
    if local and local["rope_theta"] != rope["rope_theta"]:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    original = rope.get("original_max_position_embeddings")
    original = original or config.get("original_max_position_embeddings")
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original or config["max_position_embeddings"])
    if kind == "default":
        return {}
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
        return {}
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, rotated)}
    if kind == "yarn" and architecture != "phi3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(original)
        for name, method in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                method(rope[name])
        return {}
    if kind == "longrope" and architecture == "phi3":
        longer = config["max_position_embeddings"] / original
        attention = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
        writer.add_rope_scaling_attn_factors(attention)
        return {
            f"rope_factors_{which}.weight": np.array(rope[f"{which}_factor"], np.float32)
            for which in ("long", "short")
        }
    raise UserError(f"RoPE of type '{kind}' is not known for GGUF; {WAY_ROUND}")


def _llama3_factors(rope: dict[str, Any], rotated: int) -> np.ndarray:
    """Llama 3's divisors of the frequencies, (rotated / 2,) (``generate_extra_tensors``)."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / rotated
    lengths = 2 * np.pi * np.float32(rope["rope_theta"]) ** exponents
    turns = rope["original_max_position_embeddings"] / lengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
