"""What to export: one adapter directory, or several combined into one."""

from __future__ import annotations

import math

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.binding import drop_zero_ranks
from tlora_mlx.adapters.combine import Combination, combine
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.config.export_options import AdapterOptions
from tlora_mlx.errors import UserError
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.storage.files import user_path


def read_source(
    config: AdapterOptions, base_model: str | None = None, observer: Observer = SILENT
) -> Adapter:
    """Read the adapter that the options name, or combine several.

    Raises:
        UserError: one cannot be read, or they cannot be combined.
    """
    if config.run is not None:
        return drop_zero_ranks(resolve_adapter(config.run, base_model))
    paths, weights = zip(*map(path_and_weight, config.adapter), strict=True)
    adapters = [resolve_adapter(path, base_model) for path in paths]
    combination = Combination(
        config.combine,
        config.density or 1.0,
        config.svd_rank,
        config.majority_sign_method or "total",
        config.seed,
    )
    modules = {name for adapter in adapters for name in adapter.plan.modules}
    with observer.stage("combining", len(modules)) as advance:
        combined = combine(adapters, weights, combination, base_model, advance)
    return drop_zero_ranks(combined)


def path_and_weight(text: str) -> tuple[str, float]:
    """``PATH:WEIGHT``, or ``PATH`` with weight 1.

    Raises:
        UserError: the weight is not a finite number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or user_path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--adapter {text}: the weight after the colon is not a finite number")
    return path, weight
