"""``python -m tlora_mlx.report``: write a run as one HTML page."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tlora_mlx.cli import run_command
from tlora_mlx.config.parsing import parse
from tlora_mlx.config.usage_options import ReportCommand

DESCRIPTION = "Write a run as one self-contained HTML page."


def command(argv: Sequence[str] | None) -> None:
    """Write the page, and print where it is."""
    config = parse(ReportCommand, "tlora report", DESCRIPTION, argv)

    from tlora_mlx.reporting.report import report
    from tlora_mlx.terminal import Terminal, say

    say(f"report written to {report(config, Terminal())}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
