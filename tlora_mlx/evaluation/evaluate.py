"""Evaluate base model and adapter on a task, side by side, and keep their answers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tlora_mlx.adapters.loading import load_adapter
from tlora_mlx.adapters.run import read_run
from tlora_mlx.config.usage_options import EvaluateCommand
from tlora_mlx.errors import counted
from tlora_mlx.evaluation.rows import read_rows
from tlora_mlx.evaluation.subject import Subject
from tlora_mlx.evaluation.tasks import TASKS
from tlora_mlx.method.layers import adapters_off
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.runs.run_directory import EVALUATIONS
from tlora_mlx.storage.files import new_directory, user_path, write_json, write_text
from tlora_mlx.version import __version__

RESULTS = "results.jsonl"
SUMMARY = "summary.json"

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation.

    Attributes:
        directory: contains ``results.jsonl`` (one line per row: the question, the base model's and
            the adapter's answers, and their scores), ``summary.json`` and, for code and chat,
            ``base.jsonl`` and ``adapter.jsonl`` for EvalPlus and FastChat.
        model: the base model's name.
        base: its metrics.
        adapter: the adapter's.
    """

    directory: Path
    model: str
    base: Metrics
    adapter: Metrics


def evaluate(config: EvaluateCommand, observer: Observer = SILENT) -> EvaluationResult:
    """Evaluate as configured, and keep everything.

    Args:
        config: the options.
        observer: notified of each batch.

    Returns:
        The metrics of both, and the directory with all answers.

    Raises:
        UserError: the run, its base model or the data are invalid.
        RunError: it failed while running; no directory is left.
    """
    run = read_run(config.run)
    task = TASKS[config.task](config, run.config)
    rows = read_rows(config.data, config.max_samples)
    name = user_path(config.data).resolve().stem.replace(":", "-")
    output = user_path(config.output or run.directory / EVALUATIONS / f"{config.task}-{name}")
    with new_directory(output) as staging:
        base = load_adapter(
            run, base_model=config.base_model, trust_remote_code=config.trust_remote_code
        )
        format = config.format or run.config.get("format")
        subject = Subject(
            base, "base model", format, config.batch_size, config.max_tokens, observer
        )
        items = task.read(rows, subject)
        observer.note(f"{config.task}: {counted(len(items), 'row')} of {config.data}")
        start = time.perf_counter()
        with adapters_off(base.model):
            before = task.respond(subject, items)
        after = task.respond(replace(subject, title="adapter"), items)
        metrics = {"base": task.metrics(items, before), "adapter": task.metrics(items, after)}
        lines = [
            {**{k: v for k, v in item.items() if k != "sample"}, "base": b, "adapter": a}
            for item, b, a in zip(items, before, after, strict=True)
        ]
        _write_lines(staging / RESULTS, lines)
        if task.samples:
            _write_lines(staging / "base.jsonl", task.samples(items, before, base.name))
            _write_lines(staging / "adapter.jsonl", task.samples(items, after, run.directory.name))
        summary = {
            "task": config.task,
            "data": config.data,
            "rows": len(items),
            "metrics": metrics,
            "model": base.name,
            "format": format,
            "max_tokens": config.max_tokens,
            "seconds": time.perf_counter() - start,
            "tlora_mlx": __version__,
        }
        write_json(staging / SUMMARY, summary)
    return EvaluationResult(output, base.name, metrics["base"], metrics["adapter"])


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
