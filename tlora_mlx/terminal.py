"""Lines of text and progress bars on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress as bars
from rich.console import Console

from tlora_mlx.method.distributed import is_first


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
