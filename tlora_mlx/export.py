"""``python -m tlora_mlx.export``: a run directory becomes what other tools read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tlora_mlx.config import ExportCommand, parse
from tlora_mlx.errors import run_command

if TYPE_CHECKING:
    from tlora_mlx.run_directory import Run

DESCRIPTION = (
    "Export a run, another tool's adapter, or several combined: an adapter or a merged model."
)


def export(config: ExportCommand) -> Path:
    """Export as configured, without pushing; returns the directory that was made.

    Raises:
        UserError: the run, the options or the output are not right, or could not be pushed.
        RunError: it could not be written, or not as it should be.
    """
    from tlora_mlx.exporting.card import write_card
    from tlora_mlx.exporting.source import read_source
    from tlora_mlx.files import user_path

    run = read_source(config)
    if config.push_to is not None:
        _check_push(config, run)
    output = user_path(config.output or f"{run.path}-{config.format}")
    _write(run, output, config)
    if config.format == "run":
        return output
    write_card(output, run, config.format, config.base_model, config.push_to)
    return output


def _write(run: Run, output: Path, config: ExportCommand) -> None:
    """Write the export's own files."""
    if config.format == "peft":
        from tlora_mlx.exporting.peft import export_peft

        export_peft(run, output, config.layout, config.dtype, config.base_model)
    elif config.format == "mlx-lm":
        from tlora_mlx.exporting.mlx_lm import export_mlx_lm

        export_mlx_lm(run, output, config.dtype, config.base_model)
    elif config.format == "run":
        from tlora_mlx.exporting.run import export_run

        export_run(run, output, config.dtype)
    elif config.dequantize:
        from tlora_mlx.exporting.dequantize import export_dequantized

        export_dequantized(run, output)
    elif config.quantize:
        from tlora_mlx.exporting.requantize import export_requantized

        export_requantized(run, output)
    else:
        from tlora_mlx.exporting.merge import export_merged

        export_merged(run, output, config.base_model)


def _check_push(config: ExportCommand, run: Run) -> None:
    """See that a push can be tried, before anything takes long."""
    from tlora_mlx.exporting.hub import check_base, check_push

    check_push(config.push_to)
    base = config.base_model or run.config.get("base_model")
    if base and config.format != "merged":
        check_base(base)


def _loaded_by(config: ExportCommand, output: Path) -> str:
    """What to do with the export, in two lines."""
    where = repr(str(output))
    if config.format == "peft":
        return (
            f"{config.layout} PEFT adapter in {output}; load it with\n"
            f"  PeftModel.from_pretrained(base_model, {where})"
        )
    if config.format == "mlx-lm":
        return (
            f"mlx-lm adapter in {output}; try it with\n"
            f"  mlx_lm.generate --model … --adapter-path {where} --prompt …"
        )
    if config.format == "run":
        return f"run directory in {output}; try it with\n  tlora generate {output} --prompt TEXT"
    loader = "mlx_lm.load" if config.quantize else "AutoModelForCausalLM.from_pretrained"
    return f"merged model in {output}; load it with\n  {loader}({where})"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    # Merging has threads of its own: those of numpy's OpenBLAS, not loaded yet, would fight them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    def command() -> None:
        config = parse(ExportCommand, "tlora export", DESCRIPTION, argv)
        output = export(config)
        print(_loaded_by(config, output))
        if config.push_to is not None:
            from tlora_mlx.exporting.hub import push

            print(f"pushed: {push(output, config.push_to, config.private)}", flush=True)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
