"""``python -m tlora_mlx.export``: a run directory becomes what other tools read."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tlora_mlx.config import ExportCommand, parse
from tlora_mlx.errors import UserError, run_command

if TYPE_CHECKING:
    from tlora_mlx.run_directory import Run

DESCRIPTION = "Export a run, another tool's adapter, or several combined, to PEFT or as a run."


def export(config: ExportCommand) -> Path:
    """Export as configured; returns the directory that was made.

    Raises:
        UserError: the run, the options or the output are not right.
        RunError: it could not be written.
    """
    from tlora_mlx.exporting.peft import export_peft
    from tlora_mlx.exporting.run import export_run

    run = read_run_or_adapters(config)
    output = Path(config.output or f"{run.path}-{config.format}").expanduser()
    if config.format == "run":
        return export_run(run, output, config.dtype)
    return export_peft(run, output, config.layout, config.dtype, config.base_model)


def read_run_or_adapters(config: ExportCommand) -> Run:
    """What is to be exported: one adapter directory, or several combined into one.

    Raises:
        UserError: one cannot be read, or they cannot be combined.
    """
    from tlora_mlx.exporting.combine import Combination, combine
    from tlora_mlx.importing.read import read_as_run, without_dead_ranks
    from tlora_mlx.training.progress import bar

    if config.run is not None:
        return without_dead_ranks(read_as_run(config.run, config.base_model))
    paths, weights = zip(*map(_path_and_weight, config.adapter), strict=True)
    runs = [read_as_run(path, config.base_model) for path in paths]
    combination = Combination(
        config.combine,
        config.density or 1.0,
        config.svd_rank,
        config.majority_sign_method or "total",
        config.seed,
    )
    modules = {name for run in runs for name in run.plan.modules}
    with bar("combining", len(modules)) as advance:
        run = combine(runs, weights, combination, config.base_model, advance)
    return without_dead_ranks(run)


def _path_and_weight(text: str) -> tuple[str, float]:
    """``PATH:WEIGHT``, or ``PATH`` with weight 1.

    Raises:
        UserError: the weight is no finite number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--adapter {text}: the weight after the colon is no finite number")
    return path, weight


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
