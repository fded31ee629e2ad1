"""What a notebook shows of a result: the plan as a heat map, a run with its curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.reporting.charts import heat_map
from tlora_mlx.reporting.page import loss_chart
from tlora_mlx.reporting.plan_grid import plan_grid
from tlora_mlx.reporting.rendering import render
from tlora_mlx.runs.metrics import read_lines
from tlora_mlx.runs.run_directory import METRICS, PLAN
from tlora_mlx.storage.files import read_json


class DrawnPlan(RankPlan):
    """A rank plan that a notebook shows as heat maps; otherwise a ``RankPlan``."""

    def _repr_html_(self) -> str:
        return _shown([], plan_maps(self))


def drawn(plan: RankPlan) -> DrawnPlan:
    """The same plan, for notebooks."""
    return DrawnPlan(plan.rank, plan.alpha, plan.modules)


def run_html(directory: Path, lines: Sequence[str]) -> str:
    """A run directory as HTML: lines of text, the losses as curves, the plan as heat maps.

    Raises:
        UserError: the run's plan or reports are damaged.
    """
    chart = loss_chart(read_lines(directory / METRICS))
    plan = RankPlan.from_dict(read_json(directory / PLAN, "the run's rank plan"))
    return _shown([f"run in {directory}", *lines], [*([chart] if chart else []), *plan_maps(plan)])


def plan_maps(plan: RankPlan) -> list[Markup]:
    """Ranks and sensitivities of all modules, blocks downwards and kinds across."""
    total = sum(module.rank for module in plan.modules.values())

    def rank(module: ModulePlan) -> tuple[float, str]:
        return module.rank, f"{module.rank} × {module.scale:.3g}" if module.rank else "–"

    def sensitivity(module: ModulePlan) -> tuple[float, str]:
        return module.sensitivity, f"{module.sensitivity:.1e}"

    return [
        _map(plan, f"rank (× scale); total rank {total}", rank),
        _map(
            plan,
            "sensitivity, mean |W ⊙ ∂loss/∂W| (colours on a log scale)",
            sensitivity,
            lambda value: math.log10(max(value, 1e-30)),
        ),
    ]


def _map(
    plan: RankPlan,
    title: str,
    show: Callable[[ModulePlan], tuple[float, str]],
    color: Callable[[float], float] = lambda value: value,
) -> Markup:
    rows, columns, names = plan_grid(plan)
    cells: Mapping[Any, tuple[float, str, str]] = {
        place: (*show(plan.modules[name]), name) for place, name in names.items()
    }
    return heat_map(title, rows, columns, cells, color)


def _shown(lines: Sequence[str], pictures: Sequence[Markup]) -> str:
    """The page's style, confined to this output by CSS nesting."""
    style = files("tlora_mlx.reporting").joinpath("templates/style.css").read_text("utf-8")
    nested = style.replace(":root", "&").replace("body {", "& {")
    return str(render("notebook.html.j2", style=Markup(nested), lines=lines, pictures=pictures))
