"""Pictures of a plan and of a run's losses, if matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.reporting.plan_grid import experts_summed, plan_grid
from tlora_mlx.storage.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_draw() -> bool:
    """Whether matplotlib is installed, and can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _save(figure: Figure, path: Path) -> Path:
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=150))
    return path


def draw_plan(rank_plan: RankPlan, path: Path) -> Path:
    """Draw the plan, blocks × module kinds with the rank as colour, and return ``path``."""
    from matplotlib.figure import Figure

    rank_plan = experts_summed(rank_plan)
    blocks, kinds, cells = plan_grid(rank_plan)
    ranks = [
        [rank_plan.modules[cells[b, k]].rank if (b, k) in cells else float("nan") for k in kinds]
        for b in blocks
    ]
    figure = Figure(figsize=(2 + 0.8 * len(kinds), 1.5 + 0.3 * len(blocks)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(ranks, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_ylabel("block")
    axes.set_title(f"TLoRA ranks, base rank {rank_plan.rank}")
    figure.colorbar(image, label="rank")
    return _save(figure, path)


def draw_losses(reports: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw a run's losses against the iteration, and return ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("train_loss", "training"), ("val_loss", "validation")):
        points = [(r["iteration"], r[key]) for r in reports if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)
