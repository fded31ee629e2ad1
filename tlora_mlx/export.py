"""``python -m tlora_mlx.export``: convert a run to what other tools read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tlora_mlx.cli import announce, run_command
from tlora_mlx.config.export_options import ExportCommand
from tlora_mlx.config.parsing import parse

DESCRIPTION = "Write a run, or other adapters, as an adapter or a merged model for other tools."


def command(argv: Sequence[str] | None) -> None:
    """Export, print what was verified and how to load it, and push it if requested."""
    config = parse(ExportCommand, "tlora export", DESCRIPTION, argv)
    announce(f"reading {config.run or ' and '.join(config.adapter)} …")

    from tlora_mlx.publishing.export import export
    from tlora_mlx.publishing.hub import push
    from tlora_mlx.terminal import Terminal, say

    result = export(config, Terminal())
    say(result.proof.summary())
    for line in result.how_to_load.splitlines():
        say(line)
    if config.push_to is not None:
        say(f"pushed: {push(result.directory, config.push_to, config.private)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    # Merging has its own threads; those of numpy's OpenBLAS, not loaded yet, would compete.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
