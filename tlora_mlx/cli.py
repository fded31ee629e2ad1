"""The ``tlora`` console script: one subcommand per module of the same name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from tlora_mlx.version import __version__

COMMANDS = {
    "train": "fine-tune a model",
    "plan": "calibrate and show the rank plan only",
    "export": "write a run as an adapter for PEFT or mlx-lm, or merged; combine adapters",
    "inspect": "describe an adapter: a run, PEFT's or mlx-lm's",
    "upload": "push an export to the Hugging Face Hub",
    "generate": "complete a prompt with base model and adapter",
    "evaluate": "base model and adapter on a task, side by side",
    "report": "write a run as one HTML page",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tlora COMMAND …``; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"tlora_mlx {__version__}")
        return 0
    if arguments and arguments[0] in COMMANDS:
        return import_module(f"tlora_mlx.{arguments[0]}").main(arguments[1:])
    lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    usage = "\n".join(["usage: tlora COMMAND …; tlora COMMAND --help says more", *lines])
    if arguments in (["-h"], ["--help"]):
        print(usage)
        return 0
    said = f"unknown command '{arguments[0]}'" if arguments else "no command given"
    print(f"error: {said}; it is one of {', '.join(COMMANDS)}", file=sys.stderr)
    return 2
