"""Tables for the terminal: a rank plan, and the metrics of an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.reporting.plan_grid import experts_summed, plan_cell, plan_grid

if TYPE_CHECKING:  # evaluation brings transformers
    from tlora_mlx.evaluation.evaluate import EvaluationResult


def plan_table(plan: RankPlan) -> Table:
    """Blocks × module kinds, each with rank and scale."""
    shown = experts_summed(plan)
    blocks, kinds, cells = plan_grid(shown)
    table = Table(
        title="rank × scale of each module",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("block", *kinds):
        table.add_column(heading, justify="right", no_wrap=True)
    for block in blocks:
        names = [cells.get((block, kind)) for kind in kinds]
        table.add_row(block, *(plan_cell(shown, name) for name in names))
    return table


def plan_totals(plan: RankPlan) -> str:
    """A plan's totals, in one line."""
    ranks = sum(module.rank for module in plan.modules.values())
    return (
        f"{len(plan.adapted())} of {len(plan.modules)} modules adapted, total rank {ranks}, "
        f"{plan.trained_parameters():,} trained parameters"
    )


def metrics_table(result: EvaluationResult) -> Table:
    """Base model and adapter side by side."""
    table = Table(title=f"base model: {result.model}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("", "base model", "adapter", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, before in result.base.items():
        after = result.adapter.get(name)
        known = before is not None and after is not None
        table.add_row(
            name, _shown(before), _shown(after), f"{after - before:+.4g}" if known else "–"
        )
    return table


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
