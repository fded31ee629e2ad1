"""Only a model's tokenizer, so that data can be inspected before any weights are downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora_mlx.errors import UserError, first_line
from tlora_mlx.models.model_directory import MODEL_FILES, find_model, read_model_config

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_lm.tokenizer_utils import TokenizerWrapper

# transformers finds no tokenizer unless one of these exists.
TOKENIZERS = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.*", "*.tiktoken"]

# The models with a table of positions (mlx_lm/models: ``wpe``); all others compute them.
LEARNED_POSITIONS = ("gpt2", "gpt_bigcode")


@dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer as mlx-lm wraps it, and the size of its model's vocabulary.

    Attributes:
        tokenizer: mlx-lm's wrapper, with the model's end tokens.
        embeddings: how many token ids the model has; None if its configuration does not say.
        positions: how many tokens a text may have (``learned_positions``); None: any number.
        window: how many tokens the model was made for; None if its configuration does not say.
    """

    tokenizer: TokenizerWrapper
    embeddings: int | None
    positions: int | None = None
    window: int | None = None


def load_tokenizer(name: str, trust_remote_code: bool = False) -> ModelTokenizer:
    """Load the tokenizer of a model directory or Hub repository; no weights are downloaded.

    Args:
        name: the directory, or the repository.
        trust_remote_code: let the repository run its own code.

    Raises:
        UserError: it does not exist, or has no tokenizer that transformers can load.
    """
    name, path = find_model(name, MODEL_FILES)
    return read_tokenizer(name, path, trust_remote_code)


def read_tokenizer(name: str, path: Path, trust_remote_code: bool) -> ModelTokenizer:
    """Load the tokenizer of a model on this machine; arguments as for ``load_tokenizer``."""
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load

    config = read_model_config(path, name)
    if not any(any(path.glob(pattern)) for pattern in TOKENIZERS):
        raise UserError(f"model {name} has no tokenizer ({', '.join(TOKENIZERS)}) in {path}")
    try:
        ends = load_config(path).get("eos_token_id")
        options = {"trust_remote_code": trust_remote_code}
        tokenizer = load(path, options, eos_token_ids=ends)
    except (Exception, SystemExit) as error:  # whatever transformers and a tokenizer's code raise
        raise UserError(
            f"the tokenizer of model {name} cannot be loaded: {first_line(error)}"
        ) from error
    embeddings, window = (_number(config, key) for key in ("vocab_size", "max_position_embeddings"))
    return ModelTokenizer(tokenizer, embeddings, learned_positions(config), window)


def learned_positions(config: dict[str, Any]) -> int | None:
    """How long a model's table of positions is, beyond which MLX reads other memory, if any."""
    return config.get("n_positions") if config["model_type"] in LEARNED_POSITIONS else None


def _number(config: dict[str, Any], key: str) -> int | None:
    """A whole number of a model's configuration, or of its language model's."""
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        if type(number := part.get(key)) is int:
            return number
    return None
