"""The terminal: the lines, tables and progress bars that commands print.

Only the commands use it; the packages below never print.
"""

from __future__ import annotations

import math
import os
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich import progress as bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tlora_mlx.distributed.collectives import is_first
from tlora_mlx.errors import UserError, visible
from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.observer import Advance, Observer
from tlora_mlx.reporting.tables import plan_tables, plan_totals
from tlora_mlx.storage.files import is_unicode

if TYPE_CHECKING:
    from tlora_mlx.training.data_check import SplitSummary, TokenRun


# How often a stage tells how far it is where there is no progress bar.
SECONDS_BETWEEN_LINES = 30

# How long, in seconds, the next line of a paste may take to arrive; nobody types one so fast.
PASTE = 0.05


class _Console(Console):
    """A console that may disappear, since closing the terminal does not end a run.

    Other people's texts are shown as they are: no markup, no emoji codes, no control characters.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Like rich's, for all texts that are printed or in a table."""
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        """Continue silently; rich's default is to exit."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def print(self, *objects: object, **options: Any) -> None:
        """Like rich's, but only in the first process, and silent after a write error."""
        if not is_first():
            return
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True


console = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(text: str) -> None:
    """Print a line of text, above any progress bar."""
    console.print(text)


def messages() -> Iterator[str]:
    """What is typed or pasted, or the lines of standard input, unless it is empty.

    Raises:
        UserError: it is not UTF-8 text.
    """
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):  # lines can be edited, and longer than macOS's 1,024 bytes
            import readline  # noqa: F401
    while True:
        try:
            message = input("> " if typed else "")
            with suppress(EOFError):
                while typed and select.select([sys.stdin], [], [], PASTE)[0]:
                    message += "\n" + input()
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8 text") from None
        if not is_unicode(message):
            raise UserError("standard input is not UTF-8 text")
        if message.strip():
            yield message.strip()


def print_plan(plan: RankPlan) -> None:
    """Print a rank plan as a table, or as several, and its totals."""
    for table in plan_tables(plan, console.width):
        console.print(table)
    say(plan_totals(plan))


def print_sample(row: int, runs: Sequence[TokenRun]) -> None:
    """A sample as the model will see it: what counts is bold and green, between ⟦ and ⟧."""
    text = Text()
    counts = False
    for run in runs:
        if run.counts != counts:
            text.append("⟦" if run.counts else "⟧", "bold green")
        text.append(
            visible(run.text, "\n\t"),
            ("bold green" if run.counts else "dim") + " italic" * run.special,
        )
        counts = run.counts
    text.append("⟧" * counts, "bold green")
    say(f"--- row {row}; what is learnt is between ⟦ and ⟧")
    console.print(text)


def print_splits(summaries: Sequence[SplitSummary]) -> None:
    """The splits of the data in figures."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings = ("split", "samples", "tokens", "count", "longest", "cut", "left out", "repeated")
    for heading in headings:
        name = heading == "split"  # which may be long: a part of a mixture has its file's
        table.add_column(heading, justify="left" if name else "right", no_wrap=not name)
    for split in summaries:
        share = f"{split.counted / split.tokens:.0%}" if split.tokens else "–"
        figures = (split.samples, split.tokens, share, split.longest)
        figures += (len(split.cut), len(split.left_out), split.repeated)
        table.add_row(split.name, *(f"{f:,}" if isinstance(f, int) else f for f in figures))
    console.print(table)


class Terminal(Observer):
    """The observer that prints what is reported."""

    def note(self, text: str) -> None:
        """Print it as a line."""
        say(text)

    def planned(self, plan: RankPlan) -> None:
        """Print the plan as a table."""
        print_plan(plan)

    def reported(self, metrics: Mapping[str, Any]) -> None:
        """Print one line per report, unless all of its updates were skipped."""
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
        """Show a progress bar; where the output is no terminal, a line every half minute."""
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
            last, shown_text = monotonic(), ""

            def advance(steps: int = 1, text: str | None = None) -> None:
                nonlocal done, last, shown_text
                done, shown_text = done + steps, shown_text if text is None else text
                shown.update(task, advance=steps, text=shown_text)
                if hidden and monotonic() - last >= SECONDS_BETWEEN_LINES:
                    last = monotonic()
                    say(f"{name}: {done} of {total}" + (f", {shown_text}" if shown_text else ""))

            yield advance
