"""Settings that mlx-lm's models read under a different name than transformers 5 writes."""

from __future__ import annotations

from typing import Any

# mlx-lm's name of each setting and the name that transformers 5 writes, the first table's inside
# rope_parameters.
OLDER_ROPE_NAMES = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}
OLDER_NAMES = {
    "n_ctx": "n_positions",
    "num_experts": "num_local_experts",
    "num_layers": "num_hidden_layers",
    "layer_norm_epsilon": "rms_norm_eps",
}


def older_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Settings that transformers 5 moved or dropped, under the names that mlx-lm reads.

    Many of mlx-lm's models silently fall back to a default if they do not find RoPE's base
    (ml-explore/mlx-lm issue 1563), the share of each head that is rotated, or which layers attend
    to a window; others have no default and cannot be loaded.
    """
    settings = {older: config.get(name) for older, name in OLDER_NAMES.items()}
    period = _period(config.get("layer_types"))
    settings |= dict.fromkeys(("sliding_window_pattern", "full_attention_interval"), period)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
        local = rope.get("sliding_attention") or {}
        settings["rope_local_base_freq"] = local.get("rope_theta")
        rope = rope["full_attention"]
    scaling = None
    if isinstance(rope, dict):
        settings |= {older: rope.get(name) for older, name in OLDER_ROPE_NAMES.items()}
        scaling = rope if rope.get("rope_type", "default") != "default" else None
    text = config.get("text_config")
    if isinstance(text, dict):
        settings["vocab_size"] = text.get("vocab_size")
    settings = {k: v for k, v in settings.items() if v is not None and config.get(k) is None}
    if isinstance(rope, dict) and config.get("rope_scaling") is None:
        settings["rope_scaling"] = scaling
    if isinstance(text, dict):
        settings["text_config"] = text | older_settings(text)
    return settings


def _period(kinds: Any) -> int | None:
    """Every how many layers attention is full; None if there is no such pattern."""
    if not isinstance(kinds, list) or "full_attention" not in kinds:
        return None
    period = kinds.index("full_attention") + 1
    full = [(i + 1) % period == 0 for i in range(len(kinds))]
    return period if full == [kind == "full_attention" for kind in kinds] else None
