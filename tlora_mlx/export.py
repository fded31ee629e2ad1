"""``python -m tlora_mlx.export``: a run directory becomes what other tools read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tlora_mlx.config import ExportCommand, parse
from tlora_mlx.errors import run_command

if TYPE_CHECKING:
    from tlora_mlx.run_directory import Run

DESCRIPTION = "Export a run of tlora_mlx.train to PEFT."


def export(config: ExportCommand) -> Path:
    """Export as configured, without pushing; returns the directory that was made.

    Raises:
        UserError: the run, the options or the output are not right, or could not be pushed.
        RunError: it could not be written.
    """
    from tlora_mlx.exporting.card import write_card
    from tlora_mlx.exporting.peft import export_peft
    from tlora_mlx.files import user_path
    from tlora_mlx.run_directory import read_run

    run = read_run(config.run)
    if config.push_to is not None:
        _check_push(config, run)
    output = user_path(config.output or f"{run.path}-peft")
    export_peft(run, output, config.layout, config.dtype, config.base_model)
    write_card(output, run, config.format, config.base_model, config.push_to)
    return output


def _check_push(config: ExportCommand, run: Run) -> None:
    """See that a push can be tried, before anything takes long."""
    from tlora_mlx.exporting.hub import check_base, check_push

    check_push(config.push_to)
    base = config.base_model or run.config.get("base_model")
    if base and config.format != "merged":
        check_base(base)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command() -> None:
        config = parse(ExportCommand, "tlora export", DESCRIPTION, argv)
        output = export(config)
        print(f"{config.layout} PEFT adapter in {output}; load it with")
        print(f"  PeftModel.from_pretrained(base_model, {str(output)!r})")
        if config.push_to is not None:
            from tlora_mlx.exporting.hub import push

            print(f"pushed: {push(output, config.push_to, config.private)}", flush=True)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
