"""The file of results, a row per training run, and what its rows say of each method."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
        rows: of each seed, each test row's loss and number of tokens; empty where no run has them.
        right: of each seed, whether the likeliest choice is right, by row; empty likewise.
    """

    rate: float
    tests: dict[int, float]
    valids: dict[int, float]
    by_rate: dict[float, float]
    trained: int
    rows: dict[int, Sequence[Sequence[float]]]
    right: dict[int, Sequence[int]]

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
            {row["seed"]: row["test_rows"] for row in chosen if "test_rows" in row},
            {row["seed"]: row["right_rows"] for row in chosen if "right_rows" in row},
        )

    @property
    def median(self) -> float:
        """Of the test losses."""
        return statistics.median(self.tests.values())

    def good_rates(self, within: float = 0.02) -> list[float]:
        """The rates whose test loss, under the first seed, is near the lowest, in nats."""
        lowest = min(self.by_rate.values())
        return sorted(rate for rate, loss in self.by_rate.items() if loss <= lowest + within)

    def accuracy(self) -> float:
        """The share of right choices over all seeds."""
        return float(np.mean(list(self.right.values())))


def bootstrap(own: Outcome, other: Outcome, draws: int = 10_000) -> tuple[float, float] | None:
    """A 95 % interval of own's test loss minus other's, from drawing test rows with replacement.

    The rows are the same for both, and a row's losses are averaged over the seeds that both have.
    None if a run does not say its rows' losses.
    """
    seeds = sorted(own.rows.keys() & other.rows.keys())
    if not seeds:
        return None
    mine, theirs = (np.array([o.rows[seed] for seed in seeds]) for o in (own, other))
    tokens = mine[0, :, 1]
    less = (mine - theirs)[:, :, 0].mean(axis=0) * tokens
    drawn = np.random.default_rng(0).integers(0, len(tokens), (draws, len(tokens)))
    means = less[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


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
