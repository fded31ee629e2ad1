"""Options of what uses a finished adapter: ``generate``, ``inspect``, ``evaluate``, ``report``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from tlora_mlx.config.option import Config, option
from tlora_mlx.data.formats import FORMATS
from tlora_mlx.errors import UserError


@dataclass(kw_only=True)
class GenerateCommand(Config):
    """``python -m tlora_mlx.generate``."""

    run: str = option(MISSING, "run directory, or a PEFT or mlx-lm adapter", positional=True)
    prompt: str = option(MISSING, "what to complete; '-' reads it from standard input")
    max_tokens: int = option(100, "tokens to generate at most", at_least=1)
    trust_remote_code: bool = option(False, "let the model's repository run its own code")


@dataclass(kw_only=True)
class InspectCommand(Config):
    """``python -m tlora_mlx.inspect``."""

    path: str = option(MISSING, "run directory, PEFT adapter or mlx-lm adapter", positional=True)


@dataclass(kw_only=True)
class EvaluateCommand(Config):
    """``python -m tlora_mlx.evaluate``, and what ``tlora_mlx.evaluate`` takes.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is outside of what its option allows.
    """

    run: str = option(MISSING, "run directory that tlora_mlx.train made", positional=True)
    task: str = option(
        MISSING,
        "how rows are read and scored",
        choices=("math", "commonsense", "nlu", "code", "chat", "perplexity"),
    )
    data: str = option(
        MISSING,
        "file of rows, one JSON object a line; or a Hub data set, whose test split is taken",
    )
    format: str | None = option(
        None, "how raw rows are read; default: as the run was trained", choices=tuple(FORMATS)
    )
    output: str | None = option(None, "directory to make; default: RUN/evaluations/TASK-FILE")
    max_samples: int | None = option(None, "only the first so many rows", at_least=1)
    batch_size: int = option(8, "prompts, or choices, per batch", at_least=1)
    max_tokens: int = option(512, "tokens per answer at most", at_least=1)
    execute: bool = option(
        False,
        "run the code that the models wrote, in processes without network and with limits on time "
        "and memory; it is no sandbox",
    )
    trust_remote_code: bool = option(False, "let the model's repository run its own code")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.execute and self.task != "code":
            raise UserError("--execute is for --task code")


@dataclass(kw_only=True)
class ReportCommand(Config):
    """``python -m tlora_mlx.report``, and what ``tlora_mlx.report`` takes.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is outside of what its option allows.
    """

    run: str = option(MISSING, "run directory that tlora_mlx.train made", positional=True)
    output: str | None = option(None, "HTML file to write; default: RUN/report.html")
    samples: int = option(
        0, "also let base model and adapter continue so many validation prompts", at_least=0
    )
    max_tokens: int = option(120, "tokens per sample at most", at_least=1)
    trust_remote_code: bool = option(False, "let the model's repository run its own code")
