"""The results as Markdown tables and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from measuring import table_head, table_row

from comparison.methods import BASE, METHODS, REFERENCE
from comparison.results import Outcome, bootstrap, outcomes, read

COLUMNS = ["method", "trained", "best rate", "test loss", "less LoRA's", "validation", "at 3e-4"]
# Where the runs say the losses of each test row.
ROW_COLUMNS = [*COLUMNS[:5], "95 % over rows", "rates within 0.02"]
DRAWN_BY_RATE = ["LoRA", REFERENCE, "TLoRA", "task A, uniform", "random A, uniform"]


def table(results: Path) -> None:
    """Print a Markdown table per task and number of updates, and draw each task.

    Raises:
        SystemExit: the reference has not been run.
    """
    rows = read(results)
    for task in dict.fromkeys(row["task"] for row in rows):
        found = outcomes(rows, task)
        for iters, of_iters in found.items():
            if REFERENCE not in of_iters:
                raise SystemExit(
                    f"{task}, {iters} updates: run {REFERENCE!r}, which the others are compared "
                    "with"
                )
            print(f"### {task}, {iters} updates\n")
            reference = of_iters[REFERENCE]
            for row in rows:
                if (row["task"], row["iters"], row["method"]) == (task, iters, BASE):
                    right = row.get("accuracy_normalized")
                    accuracy = "" if right is None else f" and the accuracy {right:.3f}"
                    print(f"Without an adapter the test loss is {row['test']:.3f}{accuracy}.\n")
            columns = ROW_COLUMNS if reference.rows else COLUMNS
            accuracy = ["accuracy"] if reference.right else []
            print(table_head([*columns, *accuracy]))
            for name, outcome in of_iters.items():
                print(table_row(_cells(name, outcome, reference)))
            print()
        draw(task, found, results.with_name(f"compare_methods_{task}.png"))


def _cells(name: str, own: Outcome, reference: Outcome) -> list[str]:
    """A method's row, by ``COLUMNS`` or ``ROW_COLUMNS``."""
    cells = [
        name,
        f"{own.trained:,}",
        f"{own.rate:g}",
        spread(own.tests.values()),
        spread(less(own.tests, reference.tests), "+"),
    ]
    if not reference.rows:
        return [
            *cells,
            spread(less(own.valids, reference.valids), "+"),
            f"{own.by_rate[3e-4]:.3f}" if 3e-4 in own.by_rate else "",
        ]
    interval, rates = bootstrap(own, reference), own.good_rates()
    return [
        *cells,
        "" if interval is None or own is reference else "{:+.3f} to {:+.3f}".format(*interval),
        f"{rates[0]:g} to {rates[-1]:g}",
        *([f"{own.accuracy():.3f}"] if own.right else []),
    ]


def less(losses: dict[int, float], others: dict[int, float]) -> list[float]:
    """Differences, seed by seed."""
    return [losses[seed] - others[seed] for seed in losses.keys() & others.keys()]


def spread(values: Iterable[float], sign: str = "") -> str:
    """Median and range; of a single value, that."""
    values = sorted(values)
    if len(values) == 1:
        return f"{values[0]:{sign}.3f}"
    numbers = (f"{v:{sign}.3f}" for v in (statistics.median(values), values[0], values[-1]))
    return "{} ({} to {})".format(*numbers)


def draw(task: str, found: dict[int, dict[str, Outcome]], path: Path) -> None:
    """A column per number of updates: test losses of all methods; of some by learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(found), 9), layout="constrained")
    figure.suptitle(task)
    panels = figure.subplots(2, len(found), squeeze=False, height_ratios=[3, 2])
    for (iters, of_iters), (methods, rates) in zip(found.items(), panels.T, strict=True):
        names = sorted(of_iters, key=lambda name: -of_iters[name].median)
        for height, name in enumerate(names):
            outcome, colour = of_iters[name], f"C{int(METHODS[name].train_a)}"
            tests = outcome.tests.values()
            methods.hlines(height, min(tests), max(tests), colour)
            methods.plot(outcome.median, height, "o", color=colour)
        labels = [f"{name}, {of_iters[name].trained / 1000:.0f}k" for name in names]
        methods.set_yticks(range(len(names)), labels, fontsize="small")
        methods.set_title(f"{iters} updates (orange: A is trained too)")
        methods.set_xlabel("test loss (nats per token), median and range")
        for name in (n for n in DRAWN_BY_RATE if n in of_iters):
            points = zip(*sorted(of_iters[name].by_rate.items()), strict=True)
            rates.plot(*points, marker=".", label=name)
        rates.set_xscale("log")
        rates.set_xlabel("learning rate")
        rates.set_ylabel("test loss")
        rates.legend(fontsize="small")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
