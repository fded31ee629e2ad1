"""The options that say which data to read, shared by ``check``, ``plan`` and ``train``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any

from tlora_mlx.config.option import TRUST_REMOTE_CODE, Config, option
from tlora_mlx.data.formats import FORMATS, TRAINED_ON
from tlora_mlx.data.sources import columns_of, sources_of
from tlora_mlx.errors import UserError


@dataclass(kw_only=True)
class DataConfig(Config):
    """Which data to read, and how to tokenize it."""

    model: str = option(MISSING, "the model: a directory, or a Hub repository that mlx-lm loads")
    data: str | list[Any] = option(
        MISSING,
        "the data: a directory with train.jsonl (and valid.jsonl, test.jsonl) in mlx-lm's formats, "
        "a file, or a Hub data set as NAME or NAME:CONFIGURATION; give --data several times to mix "
        "several: PATH:2 counts twice, PATH:0.5 half",
    )
    format: str | None = option(
        None,
        "the format of a well-known data set's rows; not needed for rows in mlx-lm's formats",
        choices=tuple(FORMATS),
    )
    prompt_column: str | None = option(
        None, "name of the column that holds the prompt, if it is not 'prompt'"
    )
    completion_column: str | None = option(
        None, "name of the column that holds the completion, if it is not 'completion'"
    )
    messages_column: str | None = option(
        None, "name of the column that holds the messages, if it is not 'messages'"
    )
    text_column: str | None = option(
        None, "name of the column that holds the text, if it is not 'text'"
    )
    max_samples: int | None = option(
        None, "use only the first N rows of the training data; default: all", at_least=1
    )
    val_split: float | None = option(
        None,
        "share of the training rows to hold out for validation, drawn with --seed, if the data has "
        "no validation split; default: none",
        above=0.0,
        below=1.0,
    )
    max_seq_length: int = option(2048, "cut longer samples to N tokens", at_least=2)
    mask_prompt: bool | None = option(
        None,
        "leave the prompt out of the loss; default: yes if the data has prompts, as in the paper "
        "(mlx-lm: no)",
    )
    seed: int = option(0, "seed for sampling and data order", at_least=0)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt_column is None) != (self.completion_column is None):
            raise UserError("--prompt-column and --completion-column must be given together")
        if self.data is not None:
            sources_of(self.data)

    def for_reading(self) -> dict[str, Any]:
        """The arguments of ``data.reading.read_rows``."""
        columns = columns_of({name: getattr(self, f"{name}_column") for name in TRAINED_ON})
        given = {name: getattr(self, name) for name in ("data", "format", "max_samples")}
        return {**given, "columns": columns}

    def for_tokenizing(self) -> dict[str, Any]:
        """The arguments of ``data.reading.tokenize_rows``, but for rows and model."""
        names = ("max_seq_length", "mask_prompt", "val_split", "seed")
        return {name: getattr(self, name) for name in names}
