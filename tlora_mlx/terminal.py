"""The terminal: lines, tables and progress bars, as doors and the observer of commands print them.

It is in the hall since only the doors use it: no room prints.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import progress as bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tlora_mlx.distributed.collectives import is_first
from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.observer import Advance, Observer
from tlora_mlx.reporting.tables import plan_table, plan_totals

if TYPE_CHECKING:
    from tlora_mlx.training.data_check import SplitSummary, TokenRun


class _Console(Console):
    """A terminal that may go away: a run does not end with whoever watches it."""

    def on_broken_pipe(self) -> None:
        """Go on in silence; rich's own answer is to exit."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def print(self, *objects: object, **options: Any) -> None:
        """As rich's, from the first process alone; what cannot be written ends in silence."""
        if not is_first():
            return
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True


console = _Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line of text, above the bar where one is shown; nothing in it is read as markup."""
    console.print(text, markup=False)


def print_plan(plan: RankPlan) -> None:
    """A rank plan as a table, and what it adds up to."""
    console.print(plan_table(plan))
    say(plan_totals(plan))


def print_sample(row: int, runs: Sequence[TokenRun]) -> None:
    """A sample as the model will see it: what counts is bold and green, between ⟦ and ⟧."""
    text = Text()
    counts = False
    for run in runs:
        if run.counts != counts:
            text.append("⟦" if run.counts else "⟧", "bold green")
        text.append(run.text, ("bold green" if run.counts else "dim") + " italic" * run.special)
        counts = run.counts
    text.append("⟧" * counts, "bold green")
    say(f"--- row {row}; what is learnt is between ⟦ and ⟧")
    console.print(text)


def print_splits(summaries: Sequence[SplitSummary]) -> None:
    """The splits of the data in figures."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (
        "split",
        "samples",
        "tokens",
        "count",
        "longest",
        "cut",
        "left out",
        "repeated",
    ):
        table.add_column(heading, justify="left" if heading == "split" else "right", no_wrap=True)
    for split in summaries:
        share = f"{split.counted / split.tokens:.0%}" if split.tokens else "–"
        figures = (split.samples, split.tokens, share, split.longest)
        figures += (len(split.cut), len(split.left_out), split.repeated)
        table.add_row(split.name, *(f"{f:,}" if isinstance(f, int) else f for f in figures))
    return table
    console.print(table)


class Terminal(Observer):
    """The observer that prints what it is told."""

    def note(self, text: str) -> None:
        """A line of its own."""
        say(text)

    def planned(self, plan: RankPlan) -> None:
        """The plan as a table."""
        print_plan(plan)

    def reported(self, metrics: Mapping[str, Any]) -> None:
        """One line a report; one of updates that were all left out has none."""
        iteration = metrics["iteration"]
        if "val_loss" in metrics:
            loss = math.nan if metrics["val_loss"] is None else metrics["val_loss"]
            say(f"iteration {iteration}: validation loss {loss:.4f}")
        elif metrics["train_loss"] is not None:
            say(
                f"iteration {iteration}: train loss {metrics['train_loss']:.4f}, learning "
                f"rate {metrics['learning_rate']:.2e}, {metrics['tokens_per_second']:.0f} tokens/s,"
                f" peak memory {metrics['peak_memory']:.2f} GB"
            )

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A progress bar, where there is a terminal to draw it on."""
        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[text]}"),
        )
        hidden = not (console.is_terminal and is_first())
        with bars.Progress(*columns, console=console, transient=True, disable=hidden) as shown:
            task = shown.add_task(name, total=total, completed=done, text="")

            def advance(steps: int = 1, text: str | None = None) -> None:
                shown.update(task, advance=steps, **({} if text is None else {"text": text}))

            yield advance
