"""Loading the base model with mlx-lm, each failure told in one sentence."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn
import yaml

from tlora_mlx.errors import UserError
from tlora_mlx.files import check_safetensors
from tlora_mlx.model_directory import DESCRIPTION, find_model, read_model_config, weight_files

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# One of these is there wherever transformers finds a tokenizer.
TOKENIZERS = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.*", "*.tiktoken"]


@dataclass(frozen=True)
class BaseModel:
    """A base model as mlx-lm loads it.

    Attributes:
        name: the Hub repository, or the absolute path of the directory.
        original: the repository that readers of an exported adapter should load: ``name`` itself,
            or, for a quantized conversion, what its model card says it was made from; None where
            that is not known.
        config: the contents of ``config.json``.
        path: the directory on this machine.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    name: str
    original: str | None
    config: dict[str, Any]
    path: Path

    def fingerprint(self) -> str:
        """A digest of ``config.json`` and of 4 KiB from the middle of every weight tensor."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in weight_files(self.path, self.name):
            with file.open("rb") as weights:
                header = weights.read(int.from_bytes(weights.read(8), "little"))
                digest.update(header)
                start = weights.tell()
                for name, entry in json.loads(header).items():
                    if name != "__metadata__":
                        weights.seek(start + max(0, sum(entry["data_offsets"]) // 2 - 2048))
                        digest.update(weights.read(4096))
        return digest.hexdigest()


def load_base_model(name: str, trust_remote_code: bool = False) -> BaseModel:
    """Load a model directory or Hub repository.

    Raises:
        UserError: it does not exist, is not whole, or is of a kind that mlx-lm does not load.
    """
    from mlx_lm.utils import load

    name, path = find_model(name)
    config = read_model_config(path, name)
    for file in weight_files(path, name):
        check_safetensors(file, "a weight file of the model")
    if not any(any(path.glob(pattern)) for pattern in TOKENIZERS):
        raise UserError(f"model {name} has no tokenizer ({', '.join(TOKENIZERS)}) in {path}")
    trust = {"trust_remote_code": trust_remote_code}
    if config.get("model_file") and not trust_remote_code:
        raise UserError(
            f"model {name} runs code of its own ({config['model_file']}); pass --trust-remote-code "
            "if you trust it"
        )
    # mlx-lm before 0.32 runs a model's own code unasked, and has no such argument.
    known = trust if "trust_remote_code" in inspect.signature(load).parameters else {}
    try:
        model, tokenizer = load(
            str(path), tokenizer_config=trust, model_config=_older_settings(config), **known
        )
    except (Exception, SystemExit) as error:
        # mlx-lm and transformers raise whatever their parts raise; olmo's ends the process.
        raise UserError(f"mlx-lm cannot load model {name}: {_reason(error)}") from error
    model.eval()
    return BaseModel(model, tokenizer, name, _original(name, path, config), config, path)


# What mlx-lm's models read, under which name transformers 5 writes it. The first of them are inside
# of rope_parameters there.
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


def _older_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 writes elsewhere, or no more, under the names that mlx-lm reads.

    Many of mlx-lm's models fall back to a default without a word where they do not find RoPE's base
    (ml-explore/mlx-lm issue 1563), the share of each head that is rotated, or which layers attend
    to a window; others, which have no default, cannot be loaded.
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
        settings["text_config"] = text | _older_settings(text)
    return settings


def _period(kinds: Any) -> int | None:
    """After how many layers full attention comes again, where the kinds repeat like that."""
    if not isinstance(kinds, list) or "full_attention" not in kinds:
        return None
    period = kinds.index("full_attention") + 1
    full = [(i + 1) % period == 0 for i in range(len(kinds))]
    return period if full == [kind == "full_attention" for kind in kinds] else None


def _reason(error: Exception) -> str:
    """What is wrong, from the first two lines: mlx-lm puts the tensors' names on the second."""
    lines = str(error).strip().splitlines()[:2] or [type(error).__name__]
    text = " ".join(line.strip() for line in lines)
    text = text if len(text) <= 300 else text[:300] + " …"
    return f"'{text}' is missing" if isinstance(error, KeyError) else text


def _original(name: str, path: Path, config: dict[str, Any]) -> str | None:
    """The full-precision model's name: from the card of a quantized model, else the model's own."""
    if not {"quantization", "quantization_config"} & config.keys():
        return name
    card = path / "README.md"
    try:
        _, front_matter, _ = card.read_text(encoding="utf-8").split("---\n", 2)
        base = yaml.safe_load(front_matter).get("base_model")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and base else None


@dataclass(frozen=True)
class Description:
    """What a base model's ``config.json`` and card say of it.

    Attributes:
        name: as in ``BaseModel``; so is ``original``.
        model: its modules, whose weights are never made.
    """

    name: str
    original: str | None
    model_type: str
    model: nn.Module


def describe_base_model(name: str) -> Description:
    """Describe a model directory or Hub repository without its weights.

    Raises:
        UserError: it is not found, has no configuration, or is of a kind that mlx-lm does not load.
    """
    from mlx_lm.utils import _get_classes

    name, path = find_model(name, DESCRIPTION)
    config = read_model_config(path, name)
    try:
        model_class, arguments_class = _get_classes(config)
        # MLX is lazy: nobody asks for the values that the weights start with.
        model = model_class(arguments_class.from_dict({**config, **_older_settings(config)}))
    except (Exception, SystemExit) as error:  # whatever the model's own code raises
        raise UserError(f"mlx-lm cannot build model {name}: {_reason(error)}") from error
    return Description(name, _original(name, path, config), config["model_type"], model)
