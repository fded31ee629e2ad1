"""``python -m tlora_mlx.report``: a run as one HTML page to look at."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora_mlx.config import ReportCommand, parse
from tlora_mlx.errors import UserError, first_line, run_command

if TYPE_CHECKING:
    from tlora_mlx.reporting.page import Evaluation, Sample
    from tlora_mlx.run_directory import Run

DESCRIPTION = "Write a run as one self-contained HTML page."

# How many answers of each evaluation are shown.
SHOWN = 3


def report(config: ReportCommand) -> Path:
    """Write the page; returns its path.

    Raises:
        UserError: the run is not whole, or its data is gone and samples are asked for.
        RunError: the page cannot be written.
    """
    from tlora_mlx.files import read_json, user_path, write_text
    from tlora_mlx.reporting.page import page
    from tlora_mlx.run_directory import ENERGIES, METRICS, read_run
    from tlora_mlx.terminal import say

    run = read_run(config.run)
    output = user_path(config.output or run.path / "report.html")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output} must be a file in a directory that exists")
    energies = {}
    if (run.path / ENERGIES).exists():
        energies = read_json(run.path / ENERGIES, "the captured energies")
        if not isinstance(energies, dict) or not all(
            isinstance(value, (int, float)) for value in energies.values()
        ):
            raise UserError(f"{run.path / ENERGIES} holds no energies; delete it")
    reports = _read_lines(run.path / METRICS)
    evaluations = read_evaluations(run.path / "evaluations")
    samples = generated(run, config) if config.samples else []
    write_text(output, page(run, reports, energies, evaluations, samples))
    say(f"report written to {output}")
    return output


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; the last may be half written, by a run that is going on."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"{path}, line {number} is damaged: no JSON object")
    return rows


def read_evaluations(path: Path) -> list[Evaluation]:
    """What ``tlora evaluate`` left in the run directory, by name.

    Raises:
        UserError: one is damaged.
    """
    from tlora_mlx.evaluate import RESULTS, SUMMARY
    from tlora_mlx.files import read_json
    from tlora_mlx.reporting.page import Evaluation

    found = []
    for place in sorted(path.glob("[!.]*/")):
        summary = read_json(place / SUMMARY, "an evaluation's summary")
        try:
            for key in ("task", "data", "rows"):
                summary[key]
            for who in ("base", "adapter"):
                summary["metrics"][who].items()
            samples = [_shown(line) for line in _read_lines(place / RESULTS)[:SHOWN]]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"the evaluation {place} is not as tlora evaluate wrote it ({first_line(error)}); "
                "delete it and evaluate again"
            ) from None
        found.append(Evaluation(summary, [sample for sample in samples if sample]))
    return found


def _shown(line: dict[str, Any]) -> Sample | None:
    """A line of the results as a sample, where something was written."""
    from tlora_mlx.reporting.page import Sample

    answers = []
    for who in ("base", "adapter"):
        output = line[who]
        answers.append(output["answers"][0] if "answers" in output else output.get("response"))
    if None in answers:
        return None
    right = line.get("answer")
    return Sample(
        line["prompt"] if "prompt" in line else line["turns"][0],
        *answers,
        right if isinstance(right, str) else None,
    )


def generated(run: Run, config: ReportCommand) -> list[Sample]:
    """Prompts of the run's validation data (or training data, where there is none), continued by
    base model and adapter.
    """
    from dataclasses import replace

    from tlora_mlx.evaluation.subject import Subject
    from tlora_mlx.method.layers import adapters_off
    from tlora_mlx.reporting.page import Sample
    from tlora_mlx.run_directory import load_run
    from tlora_mlx.training.data import load_data, split_off

    base = load_run(run.path, config.trust_remote_code)
    stored = run.config.get
    data = load_data(
        run.config["data"],
        base.tokenizer,
        stored("max_seq_length"),
        stored("mask_prompt"),
        stored("format"),
        stored("max_samples"),
    )
    split = data["valid"]
    if stored("val_split"):
        _, split = split_off(data["train"], stored("val_split"), stored("seed"))
    rows = (split if split.samples else data["train"]).samples
    step = max(len(rows) / config.samples, 1)
    chosen = [rows[int(i * step)] for i in range(min(config.samples, len(rows)))]
    # A text without prompt is continued from its middle.
    cuts = [s.first_target if s.first_target > 1 else -(-len(s.tokens) // 2) for s in chosen]
    prompts = [s.tokens[:cut] for s, cut in zip(chosen, cuts, strict=True)]
    subject = Subject(base, "base model", stored("format"), len(prompts), config.max_tokens)
    with adapters_off(base.model):
        before = subject.complete(prompts)
    after = replace(subject, title="adapter").complete(prompts)
    decode = base.tokenizer.decode
    return [
        Sample(decode(prompt), b, a, decode(sample.tokens[cut:], skip_special_tokens=True))
        for sample, cut, prompt, b, a in zip(chosen, cuts, prompts, before, after, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: report(parse(ReportCommand, "tlora report", DESCRIPTION, argv)))


if __name__ == "__main__":
    sys.exit(main())
