"""A run's evaluations for its page: the answers, and a table of the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tlora_mlx.reporting.charts import is_finite


class Completion(NamedTuple):
    """A prompt and its answers.

    Attributes:
        prompt: what was asked.
        base: the base model's answer.
        adapter: the answer with the adapter.
        expected: the right answer; None if unknown.
    """

    prompt: str
    base: str
    adapter: str
    expected: str | None = None


class Evaluation(NamedTuple):
    """An evaluation that ``tlora evaluate`` wrote to the run directory.

    Attributes:
        summary: the content of its ``summary.json``.
        samples: its first answers; empty for a task without answers.
    """

    summary: Mapping[str, Any]
    samples: Sequence[Completion]

    @property
    def title(self) -> str:
        """The task and its data."""
        return f"{self.summary['task']}, {self.summary['data']}"


class MetricRow(NamedTuple):
    """A row of the metrics table, as text."""

    evaluation: str
    rows: str
    metric: str
    base: str
    adapter: str


def metric_rows(evaluations: Sequence[Evaluation]) -> list[MetricRow]:
    """The metrics of base model and adapter; only the first row of an evaluation has its name."""
    rows = []
    for evaluation in evaluations:
        heading = evaluation.title, str(evaluation.summary["rows"])
        metrics = evaluation.summary["metrics"]
        for name, before in metrics["base"].items():
            after = metrics["adapter"].get(name)
            rows.append(MetricRow(*heading, name, _figure(before), _figure(after)))
            heading = "", ""
    return rows


def _figure(value: Any) -> str:
    """A metric with 4 significant digits; a value that is not a number is shown unchanged."""
    if value is None:
        return "–"
    return f"{value:.4g}" if is_finite(value) else str(value)
