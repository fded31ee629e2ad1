"""How library functions report progress: they call an observer, and never print.

Source of the pattern: ml-explore/mlx-lm, ``mlx_lm/tuner/callbacks.py``, a base class that does
nothing, for callers that need only some of the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Called as work is done, with the number of steps and, optionally, a text to show.
Advance = Callable[..., None]


def no_advance(steps: int = 1, text: str | None = None) -> None:
    """An ``Advance`` that does nothing."""


class Observer:
    """Receives what library functions report; this base class ignores it.

    A subclass overrides the methods that it needs; ``terminal.Terminal`` prints.
    """

    def note(self, text: str) -> None:
        """One line about what was found or decided."""

    def planned(self, plan: Any) -> None:
        """The ranks and scales, once they are known: a ``method.allocation.RankPlan``."""

    def reported(self, metrics: Mapping[str, Any]) -> None:
        """One report of a training run, with the content of a line of ``metrics.jsonl``."""

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A stage of ``total`` steps, of which ``done`` are done; yields its ``Advance``."""
        yield no_advance


SILENT = Observer()
