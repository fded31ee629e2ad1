"""Where a model's files are on this machine, and which of them are weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tlora_mlx.errors import UserError, shown
from tlora_mlx.storage.files import read_json, user_path
from tlora_mlx.storage.hub_names import can_be_repository, why_not_provided

# What mlx-lm downloads (mlx_lm/utils.py, DEFAULT_ALLOW_PATTERNS), the licence, which often has to
# accompany a changed model, and the card, which names what a conversion was made from.
MODEL_FILES = ["*.json", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt"]
MODEL_FILES += ["*.jsonl", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]
DOWNLOADED = [*MODEL_FILES, "model*.safetensors", "README.md"]

# The files that give a model's family and origin, without its weights.
DESCRIPTION = ["config.json", "README.md"]
INDEX = "model.safetensors.index.json"
# More layers, or experts in one, would only fill the memory while the model is built.
MOST_LAYERS = 10_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_model_name(name: str) -> None:
    """Check what can be checked of a model's name without loading or downloading anything.

    Raises:
        UserError: it is neither a directory with a ``config.json`` nor a Hub repository's name.
    """
    path = _directory(name)
    if path is not None:
        read_model_config(path, name)
    elif not can_be_repository(name):
        raise UserError(f"model directory {name} does not exist")


def find_model(name: str, files: Sequence[str] = DOWNLOADED) -> tuple[str, Path]:
    """The name that a run records for a model, and the model's directory on this machine.

    Args:
        name: a directory, or a Hub repository, which is downloaded into the Hub client's cache.
        files: patterns of the files to download.

    Raises:
        UserError: it is neither.
    """
    path = _directory(name)
    if path is None:
        return name, _download(name, files)
    return recorded_name(name), path


def recorded_name(name: str) -> str:
    """``find_model``'s name of a model that need not be there: a directory by its absolute path."""
    path = user_path(name)
    return str(path.resolve()) if path.is_dir() else name


def _directory(name: str) -> Path | None:
    """The model's directory on this machine; None if there is none of that name.

    Raises:
        UserError: it is a file, or no valid path.
    """
    path = user_path(name)
    if not path.exists():
        return None
    if not path.is_dir():
        raise UserError(f"model {name} is a file; give the directory that holds config.json")
    for entry in path.iterdir():
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise UserError(f"{entry} is no file, but a pipe or device; delete it")
    return path


def read_model_config(path: Path, name: str) -> dict[str, Any]:
    """The contents of a model directory's ``config.json``.

    Raises:
        UserError: it is missing, or is not a model's configuration.
    """
    config = read_json(path / "config.json", f"the configuration of model {name}")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(
            f"{path / 'config.json'} has no 'model_type', so it is not a model's configuration"
        )
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key, value in part.items():
            if re.search("layer|expert", key) and type(value) is int and value > MOST_LAYERS:
                raise UserError(
                    f"{path / 'config.json'} has {key} {shown(value)}, which is no model's"
                )
    return config


def front_matter(card: Path) -> dict[str, Any]:
    """The metadata of a model card; empty if there is none, or if it is damaged."""
    from huggingface_hub import metadata_load

    try:
        return (card.is_file() and metadata_load(card)) or {}
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        return {}


def family_here(name: str) -> str | None:
    """The ``model_type`` of a model that is on this machine; None if it is not, or is damaged.

    Args:
        name: a directory, or a Hub repository, which is looked up in the Hub client's cache alone.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        path = _directory(name)
        if path is None and can_be_repository(name):
            file = try_to_load_from_cache(name, "config.json")
            path = Path(file).parent if isinstance(file, str) else None
        return read_model_config(path, name)["model_type"] if path else None
    except UserError:
        return None


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a model's ``config.json`` says that its weights are quantized."""
    return bool({"quantization", "quantization_config"} & config.keys())


def read_index(directory: Path) -> dict[str, str]:
    """The file of each tensor by the index; empty if there is no index."""
    path = directory / INDEX
    if not path.exists():
        return {}
    index: Any = read_json(path, "the index of the model's weights")
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"the index {path} has no table 'weight_map'")
    for tensor, shard in placed.items():
        # Only the name is checked: in the Hub client's cache, files are links to elsewhere.
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise UserError(
                f"the index {path} places {tensor} in {shard!r}, which is not a safetensors file"
            )
        if {"/", "\\", "\0"} & set(shard):
            raise UserError(
                f"the index {path} places {tensor} in {shard!r}, outside the model's directory"
            )
    return placed


def weight_files(path: Path, name: str) -> list[Path]:
    """A model's weight files: those that its index names or, without one, ``model*.safetensors``.

    mlx-lm loads every ``model*.safetensors``, whatever the index says, so there must be none that
    the index does not name.

    Raises:
        UserError: there are none, or some that the index does not name; pickled weights, which can
            run code when they are read, do not count.
    """
    files = sorted(path.glob("model*.safetensors"))
    if shards := sorted(set(read_index(path).values())):
        strays = [file.name for file in files if file.name not in shards]
        if strays:
            raise UserError(
                f"model {name} has {', '.join(strays)} beside the weight files that {INDEX} names; "
                "mlx-lm would load both, so delete what is out of date"
            )
        return [path / shard for shard in shards]
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
    """The local snapshot of these files of a Hub repository."""
    if not can_be_repository(name):
        raise UserError(f"model directory {name} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the client's errors share no base class below Exception
        raise UserError(
            f"model {name} is not a directory, and the Hugging Face Hub did not provide it: "
            f"{why_not_provided(error)}"
        ) from None
