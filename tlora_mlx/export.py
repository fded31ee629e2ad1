"""``python -m tlora_mlx.export``: a run directory becomes what other tools read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tlora_mlx.config import ExportCommand, parse
from tlora_mlx.errors import run_command

DESCRIPTION = "Export a run, another tool's adapter, or several combined, to PEFT or as a run."


def export(config: ExportCommand) -> Path:
    """Export as configured; returns the directory that was made.

    Raises:
        UserError: the run, the options or the output are not right.
        RunError: it could not be written.
    """
    from tlora_mlx.exporting.peft import export_peft
    from tlora_mlx.exporting.run import export_run
    from tlora_mlx.exporting.source import read_source

    run = read_source(config)
    output = Path(config.output or f"{run.path}-{config.format}").expanduser()
    if config.format == "run":
        return export_run(run, output, config.dtype)
    return export_peft(run, output, config.layout, config.dtype, config.base_model)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        config = parse(ExportCommand, "tlora export", DESCRIPTION, argv)
        output = export(config)
        if config.format == "run":
            print(f"run directory in {output}; try it with")
            print(f"  python -m tlora_mlx.generate {output} --prompt TEXT")
            return
        print(f"{config.layout} PEFT adapter in {output}; load it with")
        print(f"  PeftModel.from_pretrained(base_model, {str(output)!r})")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
