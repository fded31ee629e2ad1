"""Lines of text and progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
from rich import progress as bars
from rich.console import Console

# Under mlx.launch the first process speaks for all.
_quiet = mx.distributed.init().rank() > 0
console = Console(highlight=False, soft_wrap=True, quiet=_quiet)


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
