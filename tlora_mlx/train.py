"""``python -m tlora_mlx.train``: calibrate, allocate, initialise and train."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from tlora_mlx.cli import run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.training_options import TrainConfig

DESCRIPTION = "Fine-tune a language model with TLoRA (task-aware LoRA: A frozen, B trained)."


def command(argv: Sequence[str] | None) -> None:
    """Train, and print a summary."""
    config = parse(TrainConfig, "tlora train", DESCRIPTION, argv, complete=_with_stored_options)

    from tlora_mlx.terminal import Terminal, say
    from tlora_mlx.training.session import train

    result = train(config, Terminal())
    if not result.was_finished:
        for line in result.summary():
            say(line)
    done = "the run in {} is finished" if result.was_finished else "adapter saved in {}"
    directory, argument = result.directory, shlex.quote(str(result.directory))
    say(f"{done.format(directory)}; next: python -m tlora_mlx.export {argument} --format peft")


def _with_stored_options(given: dict[str, Any]) -> dict[str, Any]:
    """Imported late, so that ``--help`` loads nothing heavy."""
    from tlora_mlx.runs.run_directory import with_stored_options

    return with_stored_options(given)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
