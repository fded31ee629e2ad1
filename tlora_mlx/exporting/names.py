"""MLX module names against Hugging Face's, as data per family."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# Families whose MLX module paths are Hugging Face's, with 2-D weights unchanged. Each is tested by
# a round trip through transformers and PEFT (tests/test_export.py).
SAME_NAMES = {
    model_type: re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "smollm3")
}


class HFWeight(NamedTuple):
    """Where a module's weight is on Hugging Face's side.

    Attributes:
        module: its path in the model of transformers, which is what PEFT adapts.
        tensor: its weight's name in the checkpoint's safetensors files.
    """

    module: str
    tensor: str


def hf_weight(model_type: str, name: str) -> HFWeight | None:
    """Where the weight of an MLX module is on Hugging Face's side; None where it is not known."""
    pattern = SAME_NAMES.get(model_type)
    return HFWeight(name, f"{name}.weight") if pattern and pattern.fullmatch(name) else None


def mlx_name(model_type: str, module: str) -> str | None:
    """The MLX module of a Hugging Face module; None where it is not known: the way back."""
    pattern = SAME_NAMES.get(model_type)
    return module if pattern and pattern.fullmatch(module) else None


def unexportable(model_type: str, names: Iterable[str]) -> str | None:
    """Why these modules cannot be exported, in one sentence; None where they can."""
    if model_type not in SAME_NAMES:
        return (
            f"the Hugging Face names of model family '{model_type}' are not known "
            f"(known: {', '.join(sorted(SAME_NAMES))})"
        )
    unknown = [name for name in names if hf_weight(model_type, name) is None]
    if unknown:
        return (
            f"the Hugging Face names of these modules of family '{model_type}' are not known: "
            f"{', '.join(unknown)}"
        )
    return None
