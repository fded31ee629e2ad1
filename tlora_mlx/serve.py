"""``python -m tlora_mlx.serve``: mlx-lm's own server with a run, which OpenAI's clients can ask."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tlora_mlx.cli import run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.usage_options import ServeCommand

DESCRIPTION = "Serve a run on its base model, with mlx-lm's server."


def command(argv: Sequence[str] | None) -> None:
    """Become mlx-lm's server."""
    config = parse(ServeCommand, "tlora serve", DESCRIPTION, argv)

    from tlora_mlx.adapters.serving import check_address, server_arguments

    arguments = server_arguments(config.run, config.base_model)
    address = ["--host", config.host, "--port", str(config.port)]
    check_address(config.host, config.port)
    print(
        f'mlx_lm.server on http://{config.host}:{config.port}/v1, model "default_model" (for any '
        "other name it loads that model, without the run); Ctrl-C ends it",
        flush=True,
    )
    os.execv(sys.executable, [sys.executable, "-m", "mlx_lm", "server", *arguments, *address])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
