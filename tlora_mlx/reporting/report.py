"""The report of a run: the content of its directory, written as one page."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.loading import load_adapter
from tlora_mlx.adapters.run import read_run
from tlora_mlx.config.data_options import DataConfig
from tlora_mlx.config.usage_options import ReportCommand
from tlora_mlx.data.reading import read_rows, tokenize_rows
from tlora_mlx.errors import UserError, first_line
from tlora_mlx.evaluation.evaluate import RESULTS, SUMMARY
from tlora_mlx.evaluation.subject import Subject
from tlora_mlx.evaluation.survival import SURVIVAL, Survival, read_survival
from tlora_mlx.method.energy import CapturedEnergy
from tlora_mlx.method.layers import adapters_off
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.reporting.charts import is_finite
from tlora_mlx.reporting.page import Completion, Evaluation, page
from tlora_mlx.runs.metrics import read_lines
from tlora_mlx.runs.rates import read_rates
from tlora_mlx.runs.run_directory import ENERGIES, EVALUATIONS, METRICS, RATES
from tlora_mlx.storage.files import read_json, user_path, write_text
from tlora_mlx.storage.foreign import file_in

# The number of answers shown from each evaluation.
SHOWN = 3


def report(config: ReportCommand, observer: Observer = SILENT) -> Path:
    """Write a run as one HTML page.

    Args:
        config: the options.
        observer: notified as samples are generated.

    Returns:
        The page's path.

    Raises:
        UserError: the run is incomplete, or samples are requested but its data is gone.
        RunError: the page cannot be written.
    """
    run = read_run(config.run)
    output = user_path(config.output or run.directory / "report.html")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output} must be a file in a directory that exists")
    reports = read_lines(file_in(run.directory, METRICS))
    energies = _read_energies(file_in(run.directory, ENERGIES))
    evaluations = read_evaluations(run.directory)
    samples = generated(run, config, observer) if config.samples else []
    rates = read_rates(run.directory / RATES)
    survival = _read_survival(user_path(config.merged)) if config.merged else None
    write_text(output, page(run, reports, energies, evaluations, samples, rates, survival))
    return output


def _read_survival(directory: Path) -> Survival:
    """What a quantized export keeps."""
    survival = read_survival(directory)
    if survival is None:
        raise UserError(
            f"--merged {directory} has no {SURVIVAL}: it must be what export --format merged "
            "--quantize wrote, rounded by the task"
        )
    return survival


def _read_energies(path: Path) -> dict[str, CapturedEnergy]:
    """The captured energies by module; empty if there is no such file."""
    if not path.exists():
        return {}
    found = read_json(path, "the captured energies")
    try:
        return {name: _energy(shares) for name, shares in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{path} does not contain captured energies; delete it") from None


def _energy(shares: Any) -> CapturedEnergy:
    # The first runs have one number for each module.
    energy = CapturedEnergy(**(shares if isinstance(shares, dict) else {"total": shares}))
    beyond = 0 if energy.beyond is None else energy.beyond
    if not (is_finite(energy.total) and is_finite(beyond) and type(energy.leading) is int):
        raise ValueError
    return energy


def read_evaluations(directory: Path) -> list[Evaluation]:
    """The evaluations that ``tlora evaluate`` wrote to a run's directory, sorted by name.

    Raises:
        UserError: one is damaged.
    """
    found = []
    for place in sorted((directory / EVALUATIONS).glob("[!.]*/")):
        name = place.relative_to(directory)
        summary = read_json(file_in(directory, name / SUMMARY), "an evaluation's summary")
        try:
            for key in ("task", "data", "rows"):
                summary[key]
            for who in ("base", "adapter"):
                summary["metrics"][who].items()
            samples = [
                _shown(line) for line in read_lines(file_in(directory, name / RESULTS))[:SHOWN]
            ]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"the evaluation {place} is damaged ({first_line(error)}); delete it and evaluate "
                "again"
            ) from None
        found.append(Evaluation(summary, [sample for sample in samples if sample]))
    return found


def _shown(line: dict[str, Any]) -> Completion | None:
    """A line of the results as a sample; None if it has no answers."""
    answers = []
    for who in ("base", "adapter"):
        output = line[who]
        answers.append(output["answers"][0] if "answers" in output else output.get("response"))
    if None in answers:
        return None
    right = line.get("answer")
    return Completion(
        line["prompt"] if "prompt" in line else line["turns"][0],
        *answers,
        right if isinstance(right, str) else None,
    )


def generated(run: Adapter, config: ReportCommand, observer: Observer) -> list[Completion]:
    """Prompts from the run's data, continued by base model and adapter.

    They are from the validation data or, if there is none, from the training data.
    """
    base = load_adapter(
        run, base_model=config.base_model, trust_remote_code=config.trust_remote_code
    )
    names = {item.name for item in fields(DataConfig)} & run.config.keys()
    options = DataConfig(**{name: run.config[name] for name in names})
    data = tokenize_rows(
        read_rows(**options.for_reading()), base.tokenizer, **options.for_tokenizing()
    )
    rows = (data["valid"] if data["valid"].samples else data["train"]).samples
    step = max(len(rows) / config.samples, 1)
    chosen = [rows[int(i * step)] for i in range(min(config.samples, len(rows)))]
    # A text without a prompt is continued from its middle.
    cuts = [s.first_target if s.first_target > 1 else -(-len(s.tokens) // 2) for s in chosen]
    prompts = [s.tokens[:cut] for s, cut in zip(chosen, cuts, strict=True)]
    subject = Subject(base, "base model", options.format, len(prompts), config.max_tokens, observer)
    with adapters_off(base.model):
        before = subject.complete(prompts)
    after = replace(subject, title="adapter").complete(prompts)
    decode = base.tokenizer.decode
    return [
        Completion(decode(prompt), b, a, decode(sample.tokens[cut:], skip_special_tokens=True))
        for sample, cut, prompt, b, a in zip(chosen, cuts, prompts, before, after, strict=True)
    ]
