"""``python -m tlora_mlx.export``: a run directory becomes what other tools read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tlora_mlx.config import ExportCommand, parse
from tlora_mlx.errors import run_command

DESCRIPTION = "Export a run of tlora_mlx.train to PEFT."


def export(config: ExportCommand) -> Path:
    """Export as configured; returns the directory that was made.

    Raises:
        UserError: the run, the options or the output are not right.
        RunError: it could not be written.
    """
    from tlora_mlx.exporting.peft import export_peft
    from tlora_mlx.files import user_path
    from tlora_mlx.run_directory import read_run

    run = read_run(config.run)
    output = user_path(config.output or f"{run.path}-peft")
    return export_peft(run, output, config.layout, config.dtype, config.base_model)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        config = parse(ExportCommand, "tlora export", DESCRIPTION, argv)
        output = export(config)
        print(f"{config.layout} PEFT adapter in {output}; load it with")
        print(f"  PeftModel.from_pretrained(base_model, {str(output)!r})")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
