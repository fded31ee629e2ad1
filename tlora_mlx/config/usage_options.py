"""Options of the commands for finished adapters: ``generate``, ``inspect``, ``evaluate``, …"""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from tlora_mlx.config.option import TRUST_REMOTE_CODE, Config, option
from tlora_mlx.data.formats import FORMATS
from tlora_mlx.errors import UserError

# What several of the commands ask for.
RUN = "run directory that tlora train created"
ADAPTER = "run directory, or an adapter of PEFT or mlx-lm"
BASE_MODEL = "the base model, if it is not where the adapter says: a directory, or a Hub repository"


@dataclass(kw_only=True)
class GenerateCommand(Config):
    """``python -m tlora_mlx.generate``."""

    run: str = option(MISSING, ADAPTER, positional=True)
    prompt: str = option(MISSING, "text to complete; - reads it from standard input")
    max_tokens: int = option(100, "generate at most N tokens", at_least=1)
    base_model: str | None = option(None, BASE_MODEL)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)


@dataclass(kw_only=True)
class ChatCommand(Config):
    """``python -m tlora_mlx.chat``."""

    run: str = option(MISSING, ADAPTER, positional=True)
    system: str | None = option(None, "system message; default: the chat template's own")
    max_tokens: int = option(512, "at most N tokens per answer", at_least=1)
    temp: float = option(0.0, "sampling temperature; 0: always the likeliest token", at_least=0.0)
    base_model: str | None = option(None, BASE_MODEL)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)


@dataclass(kw_only=True)
class ServeCommand(Config):
    """``python -m tlora_mlx.serve``."""

    run: str = option(MISSING, RUN, positional=True)
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8080, "port to listen on", at_least=1, at_most=65535)
    base_model: str | None = option(None, BASE_MODEL)


@dataclass(kw_only=True)
class InspectCommand(Config):
    """``python -m tlora_mlx.inspect``."""

    path: str = option(MISSING, ADAPTER, positional=True)


@dataclass(kw_only=True)
class EvaluateCommand(Config):
    """``python -m tlora_mlx.evaluate``, and the configuration of ``tlora_mlx.evaluate``.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is not allowed for its option.
    """

    run: str = option(MISSING, RUN, positional=True)
    task: str = option(
        MISSING,
        "which task: how rows are read and answers scored",
        choices=("math", "commonsense", "nlu", "code", "chat", "perplexity"),
    )
    data: str = option(
        MISSING,
        "the rows: a file with a JSON object per line; or a directory with test.jsonl; or a Hub "
        "data set, whose test split is used",
    )
    format: str | None = option(
        None, "the format of raw rows; default: as in the run's training", choices=tuple(FORMATS)
    )
    output: str | None = option(None, "directory to create; default: RUN/evaluations/TASK-FILE")
    max_samples: int | None = option(None, "use only the first N rows; default: all", at_least=1)
    batch_size: int = option(8, "prompts or choices per batch", at_least=1)
    max_tokens: int = option(512, "at most N tokens per answer", at_least=1)
    execute: bool = option(
        False,
        "run the code that the models write, with limits on time, memory, files and processes, and "
        "in a sandbox where there is one (bubblewrap or namespaces on Linux, sandbox-exec on "
        "macOS): the output says which, docs/EVALUATION.md what it covers",
    )
    base_model: str | None = option(None, BASE_MODEL)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.execute and self.task != "code":
            raise UserError("--execute is for --task code")


@dataclass(kw_only=True)
class ReportCommand(Config):
    """``python -m tlora_mlx.report``, and the configuration of ``tlora_mlx.report``.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is not allowed for its option.
    """

    run: str = option(MISSING, RUN, positional=True)
    output: str | None = option(None, "HTML file to write; default: RUN/report.html")
    samples: int = option(
        0, "also show how base model and adapter continue N validation prompts", at_least=0
    )
    max_tokens: int = option(120, "at most N tokens per sample", at_least=1)
    merged: str | None = option(
        None, "also show what is left of the adapter in this model, made by export --quantize"
    )
    base_model: str | None = option(None, BASE_MODEL)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)


@dataclass(kw_only=True)
class CompletionCommand(Config):
    """``python -m tlora_mlx.completion``."""

    shell: str = option(
        MISSING, "bash, zsh or tcsh", choices=("bash", "zsh", "tcsh"), positional=True
    )
