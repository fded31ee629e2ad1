"""What is exported: one adapter directory, or several combined into one."""

from __future__ import annotations

import math

from tlora_mlx.config import ExportCommand
from tlora_mlx.errors import UserError
from tlora_mlx.exporting.combine import Combination, combine
from tlora_mlx.files import user_path
from tlora_mlx.importing.read import read_as_run, without_dead_ranks
from tlora_mlx.run_directory import Run
from tlora_mlx.terminal import bar


def read_source(config: ExportCommand) -> Run:
    """What is to be exported: one adapter directory, or several combined into one.

    Raises:
        UserError: one cannot be read, or they cannot be combined.
    """
    if config.run is not None:
        return without_dead_ranks(read_as_run(config.run, config.base_model))
    paths, weights = zip(*map(path_and_weight, config.adapter), strict=True)
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


def path_and_weight(text: str) -> tuple[str, float]:
    """``PATH:WEIGHT``, or ``PATH`` with weight 1.

    Raises:
        UserError: the weight is no finite number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or user_path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--adapter {text}: the weight after the colon is no finite number")
    return path, weight
