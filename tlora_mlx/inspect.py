"""``python -m tlora_mlx.inspect``: describe an adapter directory, and who reads it correctly."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tlora_mlx.cli import run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.usage_options import InspectCommand

DESCRIPTION = "Describe an adapter directory: a run, or an adapter of PEFT or mlx-lm."


def command(argv: Sequence[str] | None) -> None:
    """Print format, base model, ranks, size, and the scale that each reader applies."""
    config = parse(InspectCommand, "tlora inspect", DESCRIPTION, argv)

    from tlora_mlx.adapters.readers import readings
    from tlora_mlx.adapters.registry import read_adapter
    from tlora_mlx.reporting.inspection import (
        advice,
        base_family,
        described,
        readers_table,
        size,
    )
    from tlora_mlx.terminal import console, print_plan, say

    adapter = read_adapter(config.path)
    for line in described(adapter):
        say(line)
    print_plan(adapter.plan)
    say(size(adapter))
    found = readings(adapter, base_family(adapter))
    if table := readers_table(found):
        console.print(table)
    for line in advice(adapter, found):
        say(line)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
