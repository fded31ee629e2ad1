"""``python -m tlora_mlx.evaluate``: base model and adapter on a task, side by side."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tlora_mlx.config import EvaluateCommand, parse
from tlora_mlx.errors import run_command
from tlora_mlx.version import __version__

DESCRIPTION = "Evaluate a run's base model and its adapter on one of five task families."

RESULTS = "results.jsonl"
SUMMARY = "summary.json"


def evaluate(config: EvaluateCommand) -> Path:
    """Evaluate as configured, print the metrics, keep everything.

    Returns:
        The directory with ``results.jsonl`` (a line a row: what was asked, what base model and
        adapter gave and how it was scored), ``summary.json`` and, for code and chat,
        ``base.jsonl`` and ``adapter.jsonl`` as EvalPlus and FastChat read them.

    Raises:
        UserError: the run, its base model or the data are not right.
        RunError: it failed while running; no directory is left.
    """
    from tlora_mlx.evaluation.rows import read_rows
    from tlora_mlx.evaluation.subject import Subject
    from tlora_mlx.files import new_directory, user_path, write_json
    from tlora_mlx.method.layers import adapters_off
    from tlora_mlx.run_directory import load_run, read_run
    from tlora_mlx.terminal import say

    run = read_run(config.run)
    rows = read_rows(config.data, config.max_samples)
    name = Path(config.data).stem.replace(":", "-")
    output = user_path(config.output or run.path / "evaluations" / f"{config.task}-{name}")
    with new_directory(output) as beside:
        base = load_run(run.path, config.trust_remote_code)
        family = _family(config, run.config)
        format = config.format or run.config.get("format")
        subject = Subject(base, "base model", format, config.batch_size, config.max_tokens)
        items = family.read(rows, subject)
        say(f"{config.task}: {len(items)} rows of {config.data}")
        start = time.perf_counter()
        with adapters_off(base.model):
            before = family.respond(subject, items)
        after = family.respond(replace(subject, title="adapter"), items)
        results = {
            "base": family.metrics(items, before),
            "adapter": family.metrics(items, after),
        }
        lines = [
            {**{k: v for k, v in item.items() if k != "sample"}, "base": b, "adapter": a}
            for item, b, a in zip(items, before, after, strict=True)
        ]
        _write_lines(beside / RESULTS, lines)
        if family.samples:
            _write_lines(beside / "base.jsonl", family.samples(items, before, base.name))
            _write_lines(beside / "adapter.jsonl", family.samples(items, after, run.path.name))
        summary = {
            "task": config.task,
            "data": config.data,
            "rows": len(items),
            "metrics": results,
            "model": base.name,
            "format": format,
            "max_tokens": config.max_tokens,
            "seconds": time.perf_counter() - start,
            "tlora_mlx": __version__,
        }
        write_json(beside / SUMMARY, summary)
    _print_metrics(results, base.name)
    say(f"results in {output}")
    return output


class Family(NamedTuple):
    """How the rows of a task are read and answered, the answers measured, and, where another tool
    judges them, written for it.
    """

    read: Callable[..., list[dict[str, Any]]]
    respond: Callable[..., list[dict[str, Any]]]
    metrics: Callable[..., dict[str, float | None]]
    samples: Callable[..., list[dict[str, Any]]] | None = None


def _family(config: EvaluateCommand, stored: dict[str, Any]) -> Family:
    from functools import partial

    from tlora_mlx.evaluation import chat, choices, code_generation, mathematics, perplexity
    from tlora_mlx.evaluation.execution import Limits

    if config.task == "math":
        return Family(mathematics.read, mathematics.respond, mathematics.metrics)
    if config.task == "commonsense":
        return Family(choices.read, choices.respond, choices.metrics)
    if config.task == "nlu":
        return Family(choices.read, choices.respond, choices.labelled_metrics)
    if config.task == "code":
        limits = Limits() if config.execute else None
        respond = partial(code_generation.respond, limits=limits)
        code = code_generation
        return Family(code.read, respond, code.metrics, code.samples)
    if config.task == "chat":
        return Family(chat.read, chat.respond, chat.metrics, chat.samples)
    read = partial(
        perplexity.read,
        max_seq_length=stored.get("max_seq_length") or 2048,
        mask_prompt=stored.get("mask_prompt"),
    )
    return Family(read, perplexity.respond, perplexity.metrics)


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    from tlora_mlx.files import write_text

    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _print_metrics(results: dict[str, dict[str, float]], model: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from tlora_mlx.terminal import console

    table = Table(title=f"base model: {model}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("", "base model", "adapter", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, before in results["base"].items():
        after = results["adapter"].get(name)
        known = before is not None and after is not None
        table.add_row(
            name, _shown(before), _shown(after), f"{after - before:+.4g}" if known else "–"
        )
    console.print(table)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(
        lambda: evaluate(parse(EvaluateCommand, "tlora evaluate", DESCRIPTION, argv))
    )


if __name__ == "__main__":
    sys.exit(main())
