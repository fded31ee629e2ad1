"""Loading the base model with mlx-lm; each failure becomes a one-sentence error."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from tlora_mlx.errors import UserError
from tlora_mlx.models.compatibility import older_settings
from tlora_mlx.models.model_directory import (
    DESCRIPTION,
    find_model,
    front_matter,
    is_quantized,
    read_model_config,
    weight_files,
)
from tlora_mlx.models.tokenizer import learned_positions, read_tokenizer
from tlora_mlx.storage.safetensors import TensorFile, check_safetensors

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class BaseModel:
    """A base model as mlx-lm loads it.

    Attributes:
        model: its modules.
        tokenizer: mlx-lm's wrapper of its tokenizer.
        name: the Hub repository, or the absolute path of the directory.
        original: the repository that readers of an exported adapter should load: ``name`` itself,
            or, for a quantized conversion, what its model card says it was made from; None if
            unknown.
        config: the contents of ``config.json``.
        path: the directory on this machine.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    name: str
    original: str | None
    config: dict[str, Any]
    path: Path

    def description(self) -> Description:
        """Its ``Description``, as ``describe_base_model`` returns it."""
        return Description(self.name, self.original, self.config["model_type"], self.model)

    def room(self, tokens: int, wanted: int = 0) -> int:
        """How many of the ``wanted`` tokens can follow so many others.

        Raises:
            UserError: there are more tokens than the model has positions, or none is left.
        """
        positions = learned_positions(self.config)
        if positions is None:
            return wanted
        if tokens + min(wanted, 1) > positions:
            raise UserError(
                f"a text has {tokens:,} tokens, and model {self.name} has positions for "
                f"{positions:,}; shorten it"
            )
        return min(wanted, positions - tokens)

    def fingerprint(self) -> str:
        """A digest of ``config.json`` and of 4 KiB from the middle of every weight tensor."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for path in weight_files(self.path, self.name):
            file = TensorFile(path, "a weight file of the model")
            digest.update(file.header)
            with path.open("rb") as weights:
                for entry in file.entries.values():
                    middle = (entry.start + entry.stop - 2 * file.data_start) // 2
                    weights.seek(file.data_start + max(0, middle - 2048))
                    digest.update(weights.read(4096))
        return digest.hexdigest()


def load_base_model(name: str, trust_remote_code: bool = False) -> BaseModel:
    """Load a model directory or Hub repository.

    Args:
        name: the directory, or the repository.
        trust_remote_code: let the repository run its own code.

    Returns:
        The model in evaluation mode, with its tokenizer.

    Raises:
        UserError: it does not exist, is incomplete, or is of a kind that mlx-lm does not support.
    """
    from mlx_lm.utils import load_model

    name, path = find_model(name)
    config = read_model_config(path, name)
    for file in weight_files(path, name):
        check_safetensors(file, "a weight file of the model")
    if config.get("model_file") and not trust_remote_code:
        raise UserError(
            f"model {name} runs its own code ({config['model_file']}); pass --trust-remote-code "
            "if you trust it"
        )
    tokenizer = read_tokenizer(name, path, trust_remote_code).tokenizer
    # mlx-lm before 0.32 runs a model's own code without asking, and has no such argument.
    has_argument = "trust_remote_code" in inspect.signature(load_model).parameters
    trust = {"trust_remote_code": trust_remote_code} if has_argument else {}
    try:
        model, _ = load_model(path, model_config=older_settings(config), **trust)
    except (Exception, SystemExit) as error:
        # mlx-lm raises whatever a model's code raises; olmo's ends the process.
        raise UserError(f"mlx-lm cannot load model {name}: {_reason(error)}") from error
    if not hasattr(model, "_no_grad"):  # recurrent_gemma's class does not call this itself
        nn.Module.__init__(model)
    model.eval()
    return BaseModel(model, tokenizer, name, _original(name, path, config), config, path)


def _reason(error: Exception) -> str:
    """The error's first two lines: mlx-lm puts the tensors' names on the second."""
    lines = str(error).strip().splitlines()[:2] or [type(error).__name__]
    text = " ".join(line.strip() for line in lines)
    text = text if len(text) <= 300 else text[:300] + " …"
    return f"'{text}' is missing" if isinstance(error, KeyError) else text


def _original(name: str, path: Path, config: dict[str, Any]) -> str | None:
    """The full-precision model's name: from the model card if quantized, else the model's own."""
    if not is_quantized(config):
        return name
    base = front_matter(path / "README.md").get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and base else None


@dataclass(frozen=True)
class Description:
    """What a base model's ``config.json`` and card say about it.

    Attributes:
        name: as in ``BaseModel``; so is ``original``.
        model: its modules; ``describe_base_model`` never evaluates their weights.
    """

    name: str
    original: str | None
    model_type: str
    model: nn.Module


def describe_base_model(name: str) -> Description:
    """Describe a model directory or Hub repository without reading its weights.

    Raises:
        UserError: it is not found, has no configuration, or mlx-lm does not support its kind.
    """
    from mlx_lm.utils import _get_classes

    name, path = find_model(name, DESCRIPTION)
    config = read_model_config(path, name)
    try:
        model_class, arguments_class = _get_classes(config)
        # MLX is lazy: the initial weights are never computed.
        model = model_class(arguments_class.from_dict({**config, **older_settings(config)}))
    except (Exception, SystemExit) as error:  # whatever the model's own code raises
        raise UserError(f"mlx-lm cannot build model {name}: {_reason(error)}") from error
    return Description(name, _original(name, path, config), config["model_type"], model)
