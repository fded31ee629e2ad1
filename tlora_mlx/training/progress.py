"""What a training command shows on the terminal: the plan as a table, what a run came to."""

from __future__ import annotations

from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.terminal import console, say
from tlora_mlx.training.checkpoint import Progress


def plan_grid(plan: RankPlan) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    """Blocks, module kinds, and the full name at each (block, kind): how a plan is laid out.

    ``model.layers.3.self_attn.q_proj`` is block ``3``, kind ``q_proj``.
    """
    cells = {}
    for name in plan.modules:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        kind = parts[-1]
        if (parts[number], kind) in cells:  # two of one kind in a block
            kind = ".".join(parts[number + 1 :])
        cells[parts[number], kind] = name
    return (
        list(dict.fromkeys(block for block, _ in cells)),
        list(dict.fromkeys(kind for _, kind in cells)),
        cells,
    )


def experts_summed(plan: RankPlan) -> RankPlan:
    """The plan as it is shown: a stacked layer's experts as one, with the sum of their ranks.

    Its scale is the mean of those that have an adapter.
    """
    modules: dict[str, ModulePlan] = {}
    stacks: dict[str, list[ModulePlan]] = {}
    for name, module in plan.modules.items():
        stack, _, number = name.rpartition(".")
        if not number.isdigit():
            modules[name] = module
            continue
        experts = stacks.setdefault(stack, [])
        experts.append(module)
        scales = [expert.scale for expert in experts if expert.rank]
        modules[stack] = replace(
            module,
            rank=sum(expert.rank for expert in experts),
            scale=sum(scales) / max(1, len(scales)),
            sensitivity=sum(expert.sensitivity for expert in experts),
        )
    return replace(plan, modules=modules)


def print_plan(plan: RankPlan) -> None:
    """The plan as a table: blocks × module kinds, each with rank and scale."""
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
    console.print(table)
    ranks = sum(module.rank for module in plan.modules.values())
    say(
        f"{len(plan.adapted())} of {len(plan.modules)} modules adapted, ranks add up to {ranks}, "
        f"{plan.trained_parameters():,} trained parameters"
    )


def plan_cell(plan: RankPlan, name: str | None) -> str:
    """One module of the table: "12×1.5", a dash for rank 0, nothing where there is no module."""
    if name is None:
        return ""
    module = plan.modules[name]
    return f"{module.rank}×{module.scale:.3g}" if module.rank else "–"


def say_summary(progress: Progress, test_loss: float | None) -> None:
    """What a run came to: updates, time, tokens and losses."""
    seconds = round(progress.seconds)
    say(
        f"trained {progress.iteration} iterations on {progress.trained_tokens:,} tokens in "
        f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        + (f", {progress.skipped} updates left out as not finite" if progress.skipped else "")
    )
    if progress.best_loss is not None and progress.first_val_loss is not None:
        say(
            f"validation loss {progress.first_val_loss:.4f} before, {progress.best_loss:.4f} after "
            f"iteration {progress.best_iteration}, whose adapter is kept"
        )
    if progress.test_loss is not None or test_loss is not None:
        losses = ("nan" if x is None else f"{x:.4f}" for x in (progress.test_loss, test_loss))
        say("test loss {} before, {} after".format(*losses))
