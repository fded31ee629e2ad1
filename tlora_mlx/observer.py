"""How library functions tell what they are doing: they call an observer, and never print.

Source of the pattern: ml-explore/mlx-lm, ``mlx_lm/tuner/callbacks.py``, a base class that does
nothing, for those who want only some of the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Called as work gets done: with the number of steps and, where there is one, a text to show.
Advance = Callable[..., None]


def no_advance(steps: int = 1, text: str | None = None) -> None:
    """An ``Advance`` that tells nobody."""


class Observer:
    """What a library function tells whoever called it; this one ignores it all.

    ``terminal.Terminal`` is the one that prints. A subclass overrides what it is interested in.
    """

    def note(self, text: str) -> None:
        """One line about what was found or decided."""

    def planned(self, plan: Any) -> None:
        """Ranks and scales are known: a ``method.allocation.RankPlan``."""

    def reported(self, metrics: Mapping[str, Any]) -> None:
        """One report of a training run, as a line of ``metrics.jsonl`` holds it."""

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A stage of ``total`` steps, of which ``done`` are done; yields what advances it."""
        yield no_advance


SILENT = Observer()
