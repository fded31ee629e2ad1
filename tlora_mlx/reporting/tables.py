"""Tables for the terminal: a rank plan, and the metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.reporting.plan_grid import experts_summed, plan_cell, plan_grid

if TYPE_CHECKING:  # evaluation brings transformers
    from tlora_mlx.evaluation.evaluate import EvaluationResult


def plan_tables(plan: RankPlan, width: int) -> Iterator[Table]:
    """Blocks × module kinds, each with rank and scale; several tables if one would be too wide.

    Args:
        plan: a rank plan.
        width: how many columns of text there are.
    """
    shown = experts_summed(plan)
    blocks, kinds, cells = plan_grid(shown)
    columns = {"block": blocks} | {
        kind: [plan_cell(shown, cells.get((block, kind))) for block in blocks] for kind in kinds
    }
    # The box puts a space before the first column and after each, beside the padding.
    widths = {name: max(map(len, (name, *texts))) + 2 for name, texts in columns.items()}
    while kinds:
        count, left = 0, width - 1 - widths["block"]
        while count < len(kinds) and (left := left - widths[kinds[count]]) >= 0:
            count += 1
        part, kinds = kinds[: max(count, 1)], kinds[max(count, 1) :]
        table = Table(
            title="rank × scale of each module",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for heading in ("block", *part):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in zip(*(columns[name] for name in ("block", *part)), strict=True):
            table.add_row(*row)
        yield table


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
