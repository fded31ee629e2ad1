"""Evaluations of a run as its page shows them: the answers, and the metrics as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tlora_mlx.reporting.charts import is_finite


class Completion(NamedTuple):
    """A prompt and its continuations.

    Attributes:
        prompt: what was asked.
        base: the base model's answer.
        adapter: the answer with the adapter.
        expected: the right answer; None where it is not known.
    """

    prompt: str
    base: str
    adapter: str
    expected: str | None = None


class Evaluation(NamedTuple):
    """What ``tlora evaluate`` left in the run directory.

    Attributes:
        summary: the content of its ``summary.json``.
        samples: its first answers; none for a task without answers.
    """

    summary: Mapping[str, Any]
    samples: Sequence[Completion]

    @property
    def title(self) -> str:
        """The task and its data."""
        return f"{self.summary['task']}, {self.summary['data']}"


class MetricRow(NamedTuple):
    """A row of the table of metrics, as texts."""

    evaluation: str
    rows: str
    metric: str
    base: str
    adapter: str


def metric_rows(evaluations: Sequence[Evaluation]) -> list[MetricRow]:
    """The metrics of base model and adapter; only an evaluation's first row names it."""
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
    """A metric with 4 significant digits; a value that is not a number is shown as it is."""
    if value is None:
        return "–"
    return f"{value:.4g}" if is_finite(value) else str(value)
