"""``python -m tlora_mlx.upload``: push an exported directory to the Hugging Face Hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tlora_mlx.cli import run_command
from tlora_mlx.config.export_options import UploadCommand
from tlora_mlx.config.parsing import parse

DESCRIPTION = "Push what tlora export wrote to the Hugging Face Hub, as one commit."


def command(argv: Sequence[str] | None) -> None:
    """Push, and print the commit's address."""
    config = parse(UploadCommand, "tlora upload", DESCRIPTION, argv)

    from tlora_mlx.publishing.hub import push
    from tlora_mlx.storage.files import user_path
    from tlora_mlx.terminal import Terminal, say

    address = push(user_path(config.directory), config.repository, config.private, Terminal())
    say(f"pushed: {address}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
