"""``python -m tlora_mlx.export``: a run directory becomes what other tools read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tlora_mlx.config import ExportCommand, parse
from tlora_mlx.errors import run_command

DESCRIPTION = "Export a run of tlora_mlx.train: an adapter for PEFT or mlx-lm, or a merged model."


def export(config: ExportCommand) -> Path:
    """Export as configured; returns the directory that was made.

    Raises:
        UserError: the run, the options or the output are not right.
        RunError: it could not be written, or not as it should be.
    """
    from tlora_mlx.run_directory import read_run

    run = read_run(config.run)
    output = Path(config.output or f"{run.path}-{config.format}").expanduser()
    if config.format == "peft":
        from tlora_mlx.exporting.peft import export_peft

        return export_peft(run, output, config.layout, config.dtype, config.base_model)
    if config.format == "mlx-lm":
        from tlora_mlx.exporting.mlx_lm import export_mlx_lm

        return export_mlx_lm(run, output, config.dtype, config.base_model)
    if config.dequantize:
        from tlora_mlx.exporting.dequantize import export_dequantized

        return export_dequantized(run, output)
    if config.quantize:
        from tlora_mlx.exporting.requantize import export_requantized

        return export_requantized(run, output)
    from tlora_mlx.exporting.merge import export_merged

    return export_merged(run, output, config.base_model)


def loaded_by(config: ExportCommand, output: Path) -> str:
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
    loader = "mlx_lm.load" if config.quantize else "AutoModelForCausalLM.from_pretrained"
    return f"merged model in {output}; load it with\n  {loader}({where})"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    # Merging has threads of its own: those of numpy's OpenBLAS, not loaded yet, would fight them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    def command() -> None:
        config = parse(ExportCommand, "tlora export", DESCRIPTION, argv)
        print(loaded_by(config, export(config)))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
