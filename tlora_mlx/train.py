"""``python -m tlora_mlx.train``: calibrate, allocate, initialise and train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tlora_mlx.cli import announce, run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.invocation import suggested

DESCRIPTION = "Fine-tune a language model with TLoRA (task-aware LoRA: A frozen, B trained)."


def command(argv: Sequence[str] | None) -> None:
    """Train, and print a summary."""
    config = parse(
        TrainConfig, "tlora train", DESCRIPTION, argv, complete=_with_stored_options, note=announce
    )
    announce(f"loading model {config.model} …")

    from tlora_mlx.terminal import Terminal, say
    from tlora_mlx.training.session import train

    result = train(config, Terminal())
    if not result.was_finished:
        for line in result.summary():
            say(line)
    done = "the run in {} is finished" if result.was_finished else "adapter saved in {}"
    export = suggested("export", result.directory, "--format", "peft")
    say(f"{done.format(result.directory)}; next: {export}")


def _with_stored_options(given: dict[str, Any]) -> dict[str, Any]:
    """Imported late, so that nothing heavy is loaded before the first line."""
    if not given.get("resume"):
        return given
    from tlora_mlx.runs.run_directory import with_stored_options

    return with_stored_options(given)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
