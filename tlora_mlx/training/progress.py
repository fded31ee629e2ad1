"""What a command shows on the terminal: bars, the plan as a table, lines of text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress as bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.method.distributed import is_first
from tlora_mlx.training.checkpoint import Progress


class _Console(Console):
    """A terminal that may go away: a run does not end with whoever watches it."""

    def on_broken_pipe(self) -> None:
        """Go on in silence; rich's own answer is to exit."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def print(self, *objects: object, **options: Any) -> None:
        """As rich's; what cannot be written ends in silence."""
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True


# Under mlx.launch the first process speaks for all.
console = _Console(highlight=False, soft_wrap=True, quiet=not is_first())


def say(text: str) -> None:
    """A line of text, above the bar where one is shown; nothing in it is read as markup."""
    console.print(text, markup=False)


@contextmanager
def bar(description: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar; what it yields advances it: ``advance(steps, text)``."""
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[text]}"),
    )
    hidden = not console.is_terminal
    with bars.Progress(*columns, console=console, transient=True, disable=hidden) as shown:
        task = shown.add_task(description, total=total, completed=done, text="")

        def advance(steps: int = 1, text: str | None = None) -> None:
            shown.update(task, advance=steps, **({} if text is None else {"text": text}))

        yield advance


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


def print_plan(plan: RankPlan) -> None:
    """The plan as a table: blocks × module kinds, each with rank and scale."""
    blocks, kinds, cells = plan_grid(plan)
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
        table.add_row(block, *(plan_cell(plan, name) for name in names))
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
