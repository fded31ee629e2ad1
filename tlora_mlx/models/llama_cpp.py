"""The model families that can be written as GGUF: llama.cpp's tensor names, and its changes.

The names are those of the package ``gguf``, which llama.cpp maintains
(``gguf-py/gguf/tensor_mapping.py``); what else its converter does to a family's tensors is in
``FAMILIES`` (ggml-org/llama.cpp, ``conversion/*.py`` as of libllama 0.4.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tlora_mlx.errors import UserError, first_line
from tlora_mlx.models.names import hf_weight, unexportable
from tlora_mlx.storage.gguf_file import gguf_package

WAY_ROUND = (
    "export it with --format merged, and convert that with llama.cpp's convert_hf_to_gguf.py"
)


@dataclass(frozen=True)
class LlamaCppFamily:
    """How llama.cpp's converter treats a family.

    Attributes:
        architecture: llama.cpp's name.
        permuted: the rows of q and k are reordered for llama.cpp's kind of RoPE
            (``LlamaModel.permute``).
        norm_shift: added to the weights of norms, which transformers adds while computing.
        ignored: tensors that llama.cpp has no place for: another part of a multimodal model, or an
            output layer that equals the embeddings.
    """

    architecture: str
    permuted: bool = False
    norm_shift: float = 0.0
    ignored: str = r"(?!)"


_LLAMA = LlamaCppFamily("llama", permuted=True)
_NO_HEAD = r"lm_head\..*"
_NOT_TEXT = r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*|(?:.*\.)?lm_head\..*"

# By config.json's model_type; each is verified against llama.cpp itself (tests/merging/
# test_gguf.py).
FAMILIES: dict[str, LlamaCppFamily] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "smollm3": LlamaCppFamily("smollm3", permuted=True),
    "qwen2": LlamaCppFamily("qwen2"),
    "qwen2_moe": LlamaCppFamily("qwen2moe"),
    "qwen3": LlamaCppFamily("qwen3"),
    "qwen3_moe": LlamaCppFamily("qwen3moe"),
    "phi3": LlamaCppFamily("phi3"),
    "gemma": LlamaCppFamily("gemma", norm_shift=1.0, ignored=_NO_HEAD),
    "gemma2": LlamaCppFamily("gemma2", norm_shift=1.0, ignored=_NO_HEAD),
    "gemma3_text": LlamaCppFamily("gemma3", norm_shift=1.0, ignored=_NO_HEAD),
    "gemma3": LlamaCppFamily("gemma3", norm_shift=1.0, ignored=_NOT_TEXT),
}


class Place(NamedTuple):
    """Where a checkpoint's tensor is in the GGUF file, and how its rows differ there.

    Attributes:
        name: llama.cpp's name, such as ``blk.0.attn_q.weight``.
        heads: reorder the rows within each of so many heads; 0: they are as they are.
        shift: added to every entry.
        expert: which matrix of the stack it is; None if it is the whole tensor.
    """

    name: str
    heads: int = 0
    shift: float = 0.0
    expert: int | None = None

    def rows(self, matrix: np.ndarray) -> np.ndarray:
        """A tensor, or some whole heads of it, as the file holds it.

        Args:
            matrix: (rows, …), with as many rows per head as the whole tensor has.
        """
        if self.heads:
            matrix = _swapped(matrix, self.heads, 2)
        return matrix + np.float32(self.shift) if self.shift else matrix

    def rows_back(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of ``rows``, for a whole tensor without a shift."""
        return (
            _swapped(matrix, self.heads, matrix.shape[0] // self.heads // 2)
            if self.heads
            else (matrix)
        )


def _swapped(matrix: np.ndarray, heads: int, first: int) -> np.ndarray:
    """Rows (heads, first, second) reordered to (heads, second, first)."""
    split = matrix.reshape(heads, first, -1, *matrix.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(matrix.shape)


class LlamaCppModel:
    """A model's configuration and tensor names, as llama.cpp sees them.

    Attributes:
        model_type: the family.
        family: its entry in ``FAMILIES``.
        config: transformers' configuration of the language model, with all defaults.

    Args:
        model_type: from ``config.json``.
        path: the model's directory, which has at least ``config.json``.

    Raises:
        UserError: the family cannot be written as GGUF, the package ``gguf`` is missing, or the
            configuration cannot be read.
    """

    def __init__(self, model_type: str, path: Path):
        from transformers import AutoConfig

        self.model_type = model_type
        if model_type not in FAMILIES:
            raise UserError(
                f"model family '{model_type}' cannot be written as GGUF (known: "
                f"{', '.join(sorted(FAMILIES))}); {WAY_ROUND}"
            )
        self.family = FAMILIES[model_type]
        try:
            config = AutoConfig.from_pretrained(path)
        except Exception as error:  # transformers raises whatever a configuration makes it raise
            raise UserError(f"transformers cannot read {path}: {first_line(error)}") from None
        self.config: dict[str, Any] = config.get_text_config().to_dict()
        gguf = gguf_package()
        key = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.family.architecture)
        self._map = gguf.get_tensor_name_map(key, self.config["num_hidden_layers"])

    def place(self, tensor: str) -> Place | None:
        """Where a checkpoint's tensor belongs; None if llama.cpp has no place for it.

        Raises:
            UserError: the tensor is not known.
        """
        if re.fullmatch(self.family.ignored, tensor):
            return None
        if self.config.get("tie_word_embeddings") and tensor == "lm_head.weight":
            return None
        name = re.sub(r"^(?:language_model\.|model\.language_model\.)", "", tensor)
        name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        expert = re.search(r"\.experts\.(\d+)\.", name)
        found = self._map.get_name(
            re.sub(r"\.experts\.\d+\.", ".experts.", name), try_suffixes=(".weight", ".bias")
        )
        if found is None:
            raise UserError(
                f"llama.cpp has no name for {tensor} of family '{self.model_type}'; {WAY_ROUND}"
            )
        heads = 0
        if self.family.permuted and (part := re.search(r"\.([qk])_proj\.(weight|bias)$", name)):
            heads = self.config["num_attention_heads" if part[1] == "q" else "num_key_value_heads"]
        shift = self.family.norm_shift if name.endswith("norm.weight") else 0.0
        return Place(found, heads, shift, int(expert[1]) if expert else None)

    def place_of_module(self, name: str) -> Place:
        """Where the weight of an MLX module belongs."""
        return self.place(hf_weight(self.model_type, name).tensor)

    def check_modules(self, names: Mapping[str, Any], label: str) -> None:
        """Check that all of an adapter's modules have Hugging Face names.

        Raises:
            UserError: some have none.
        """
        if reason := unexportable(self.model_type, names):
            raise UserError(f"cannot export {label}: {reason}")
