"""The file of results, a row per training run, and what its rows say of each method."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.methods import METHODS


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a results file, which is made where there is none."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Outcome:
    """What the runs of a method say, for one task and number of updates.

    Attributes:
        rate: the learning rate with the lowest validation loss under the first seed.
        tests: test losses at that rate, by seed.
        valids: the validation losses of the same runs.
        by_rate: test losses of the first seed, by learning rate.
        trained: how many parameters were trained.
    """

    rate: float
    tests: dict[int, float]
    valids: dict[int, float]
    by_rate: dict[float, float]
    trained: int

    @staticmethod
    def of(rows: list[dict[str, Any]]) -> Outcome:
        """From all rows of the method."""
        first = [row for row in rows if row["seed"] == 0]
        best = min(first, key=lambda row: row["valid"])
        chosen = [row for row in rows if row["rate"] == best["rate"]]
        return Outcome(
            best["rate"],
            {row["seed"]: row["test"] for row in chosen},
            {row["seed"]: row["valid"] for row in chosen},
            {row["rate"]: row["test"] for row in first},
            best["trained"],
        )

    @property
    def median(self) -> float:
        """Of the test losses."""
        return statistics.median(self.tests.values())


def outcomes(rows: list[dict[str, Any]], task: str) -> dict[int, dict[str, Outcome]]:
    """By number of updates and method, in the order of ``METHODS``."""
    found: dict[int, dict[str, Outcome]] = {}
    for iters in sorted({row["iters"] for row in rows if row["task"] == task}):
        of_iters = [row for row in rows if row["task"] == task and row["iters"] == iters]
        found[iters] = {
            name: Outcome.of(own)
            for name in METHODS
            if (own := [row for row in of_iters if row["method"] == name])
        }
    return found
