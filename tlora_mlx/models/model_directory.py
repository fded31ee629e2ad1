"""Where a model's files are on this machine, and which of them are its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlora_mlx.errors import UserError, first_line
from tlora_mlx.storage.files import read_json, user_path
from tlora_mlx.storage.hub_names import can_be_repository

# What mlx-lm downloads (mlx_lm/utils.py, DEFAULT_ALLOW_PATTERNS), the licence, which some require
# to travel with a changed model, and the card, which names what a conversion was made from.
MODEL_FILES = ["*.json", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt"]
MODEL_FILES += ["*.jsonl", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]
DOWNLOADED = [*MODEL_FILES, "model*.safetensors", "README.md"]

# What tells a model's family and origin, without its weights.
DESCRIPTION = ["config.json", "README.md"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_model(name: str, files: Sequence[str] = DOWNLOADED) -> tuple[str, Path]:
    """The name a run keeps for a model, and the directory on this machine that holds it.

    Args:
        name: a directory, or a Hub repository, which is downloaded into the Hub client's cache.
        files: patterns of what is downloaded.

    Raises:
        UserError: it is neither.
    """
    path = user_path(name)
    try:
        exists = path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        raise UserError(f"model {name!r} is no path") from None
    if not exists:
        return name, _download(name, files)
    if not path.is_dir():
        raise UserError(f"model {name} is a file; give the directory that holds config.json")
    return str(path.resolve()), path


def read_model_config(path: Path, name: str) -> dict[str, Any]:
    """The contents of a model directory's ``config.json``.

    Raises:
        UserError: it is missing or no model's.
    """
    config = read_json(path / "config.json", f"the configuration of model {name}")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path / 'config.json'} has no 'model_type', so it is no model's")
    return config


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a model's ``config.json`` says that its weights are quantized."""
    return bool({"quantization", "quantization_config"} & config.keys())


def weight_files(path: Path, name: str) -> list[Path]:
    """The weight files that mlx-lm loads: all ``model*.safetensors``.

    Raises:
        UserError: there is none; pickled weights, which can run code when they are read, are none.
    """
    files = sorted(path.glob("model*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        raise UserError(
            f"model {name} has only pickled weights ({pickles[0]}), which can run code when they "
            "are read; use a repository that holds safetensors"
        )
    raise UserError(f"model {name} has no model*.safetensors in {path}")


def _download(name: str, files: Sequence[str]) -> Path:
    """The local snapshot of a Hub repository, of these files."""
    if not can_be_repository(name):
        raise UserError(f"model directory {name} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the client's errors have no common base below Exception
        raise UserError(
            f"model {name} is no directory here, and the Hugging Face Hub did not provide it: "
            f"{first_line(error)}"
        ) from None
