"""``python -m tlora_mlx.upload``: an exported directory goes to the Hugging Face Hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tlora_mlx.config import UploadCommand, parse
from tlora_mlx.errors import run_command
from tlora_mlx.files import user_path

DESCRIPTION = "Push what tlora export wrote to the Hugging Face Hub, as one commit."


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        from tlora_mlx.exporting.hub import push

        config = parse(UploadCommand, "tlora upload", DESCRIPTION, argv)
        directory = user_path(config.directory)
        print(f"pushed: {push(directory, config.repository, config.private)}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
