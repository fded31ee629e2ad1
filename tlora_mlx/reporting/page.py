"""The page's parts, from what a run directory holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any, NamedTuple

from tlora_mlx.method.allocation import ModulePlan
from tlora_mlx.reporting.charts import heat_map, line_chart, short
from tlora_mlx.reporting.style import CSS
from tlora_mlx.run_directory import Run
from tlora_mlx.training.progress import plan_grid

Reports = Sequence[Mapping[str, Any]]


class Sample(NamedTuple):
    """A prompt, what base model and adapter made of it, and what was expected, if known."""

    prompt: str
    base: str
    adapter: str
    expected: str | None = None


class Evaluation(NamedTuple):
    """What ``tlora evaluate`` left: its summary, and the first of its answers, where it has any."""

    summary: Mapping[str, Any]
    samples: Sequence[Sample]


def page(
    run: Run,
    reports: Reports,
    energies: Mapping[str, float],
    evaluations: Sequence[Evaluation],
    samples: Sequence[Sample],
) -> str:
    """The whole HTML page."""
    name = escape(run.path.resolve().name)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{name}: TLoRA run</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{CSS}</style></head><body>",
        f"<h1>{name}</h1>",
        f'<p class="dim">TLoRA adapter of {escape(run.config["model"])}, trained on '
        f"{escape(str(run.config.get('data', 'unknown data')))}</p>",
        _cards(run, reports),
        _plan(run, energies),
        _curves(reports),
        _evaluations(evaluations),
        _samples(evaluations, samples),
        _loading(run),
        _options(run),
        "</body></html>",
    ]
    return "\n".join(filter(None, parts)) + "\n"


def points(reports: Reports, key: str) -> list[tuple[float, float]]:
    """(iteration, value) of every report that has a finite value."""
    return [
        (report["iteration"], report[key])
        for report in reports
        if isinstance(report.get(key), (int, float))
        and math.isfinite(report[key])
        and isinstance(report.get("iteration"), int)
    ]


def _cards(run: Run, reports: Reports) -> str:
    validation, test = points(reports, "val_loss"), points(reports, "test_loss")
    cards = []
    for name, losses in (("validation loss", validation), ("test loss", test)):
        if len(losses) > 1:
            best = min(y for _, y in losses[1:])
            cards.append((f"{losses[0][1]:.3f} → {best:.3f}", f"{name}, before → after"))
    plan = run.plan
    adapted = len(plan.adapted())
    cards.append((f"{adapted} of {len(plan.modules)}", "modules adapted"))
    cards.append((short(plan.trained_parameters()), "trained parameters"))
    cards.append((f"{plan.rank} / {plan.alpha:g}", "base rank / alpha"))
    if iterations := points(reports, "iteration"):
        cards.append((f"{iterations[-1][0]}", "iterations"))
    if tokens := points(reports, "trained_tokens"):
        cards.append((short(tokens[-1][1]), "tokens trained on"))
    if speed := points(reports, "tokens_per_second"):
        cards.append((short(median(y for _, y in speed)), "tokens/s, median"))
    if memory := points(reports, "peak_memory"):
        cards.append((f"{max(y for _, y in memory):.2f} GB", "peak memory"))
    inside = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
        for value, what in cards
    )
    return f'<div class="cards">{inside}</div>'


def _curves(reports: Reports) -> str:
    losses = {
        "training": points(reports, "train_loss"),
        "validation": points(reports, "val_loss"),
    }
    charts = (
        [line_chart(losses, "iteration", "loss (nats per token)")] if any(losses.values()) else []
    )
    for key, label in (
        ("learning_rate", "learning rate"),
        ("tokens_per_second", "throughput (tokens per second)"),
        ("peak_memory", "peak memory (GB)"),
        ("grad_norm", "gradient norm"),
    ):
        if values := points(reports, key):
            charts.append(line_chart({label: values}, "iteration", label))
    if not charts:
        return "<h2>Training</h2><p>Nothing was reported.</p>"
    return f'<h2>Training</h2><div class="charts">{"".join(charts)}</div>'


def _plan(run: Run, energies: Mapping[str, float]) -> str:
    plan = run.plan
    rows, columns, names = plan_grid(plan)

    def cells(show: Any) -> dict[tuple[str, str], tuple[float, str, str]]:
        made = {}
        for place, name in names.items():
            if (shown := show(name, plan.modules[name])) is not None:
                made[place] = (*shown, _hint(name, plan.modules[name], energies.get(name)))
        return made

    def update(name: str, module: ModulePlan) -> tuple[float, str] | None:
        if not module.rank:
            return None
        size = module.scale * norm(run.tensors[f"{name}.lora_b"])
        return size, short(round(size, 3))

    logarithm = lambda value: math.log10(max(value, 1e-30))  # noqa: E731
    maps = [
        heat_map(
            f"rank (× scale), the ranks add up to {sum(m.rank for m in plan.modules.values())}",
            rows,
            columns,
            cells(lambda _, m: (m.rank, f"{m.rank} × {m.scale:.3g}" if m.rank else "–")),
        ),
        heat_map(
            "sensitivity, mean |W ⊙ ∂loss/∂W| (colours by its logarithm)",
            rows,
            columns,
            cells(lambda _, m: (m.sensitivity, f"{m.sensitivity:.1e}")),
            logarithm,
        ),
        heat_map(
            "size of the trained update, ‖scale · B‖",
            rows,
            columns,
            cells(update),
        ),
    ]
    text = (
        "Blocks of the model from first to last, and the linear layers in each. Ranks follow "
        "sensitivity, under one budget."
    )
    if energies:
        shares = cells(
            lambda name, _: (energies[name], f"{energies[name]:.1%}") if name in energies else None
        )
        maps.append(heat_map("energy of W·C that A captures", rows, columns, shares))
    else:
        text += (
            " What share of the energy of W·C the frozen A captures is known only where "
            "covariances were formed, not in this run."
        )
    boxes = "".join(f'<div class="wide">{table}</div>' for table in maps)
    return f'<h2>Rank plan</h2><p>{text}</p><div class="row">{boxes}</div>'


def norm(tensor: Any) -> float:
    """The Frobenius norm of an MLX array."""
    import mlx.core as mx

    return mx.sqrt(mx.square(tensor.astype(mx.float32)).sum()).item()


def _hint(name: str, module: ModulePlan, energy: float | None) -> str:
    hint = (
        f"{name}: {module.out_features} × {module.in_features}, rank {module.rank}, scale "
        f"{module.scale:.4g}, sensitivity {module.sensitivity:.3e}"
    )
    return hint if energy is None else f"{hint}, captured energy {energy:.2%}"


def _evaluations(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return ""
    parts = ["<h2>Evaluation</h2><table><tr><th>task</th><th>rows</th><th>metric</th>"]
    parts.append("<th>base model</th><th>adapter</th></tr>")
    for summary, _ in evaluations:
        metrics = summary["metrics"]
        for i, (name, before) in enumerate(metrics["base"].items()):
            what = f"{summary['task']}, {summary['data']}"
            head = (
                f"<td>{escape(what)}</td><td>{summary['rows']}</td>" if not i else "<td></td>" * 2
            )
            after = metrics["adapter"].get(name)
            values = "".join(
                f"<td>{'–' if v is None else f'{v:.4g}'}</td>" for v in (before, after)
            )
            parts.append(f"<tr>{head}<td>{escape(name)}</td>{values}</tr>")
    return "".join([*parts, "</table>"])


def _samples(evaluations: Sequence[Evaluation], samples: Sequence[Sample]) -> str:
    groups = [("prompts of the run's own data", samples)]
    groups += [(_title(summary), answers) for summary, answers in evaluations]
    groups = [group for group in groups if group[1]]
    parts = ["<h2>Samples, before and after</h2>"] if groups else []
    for title, shown in groups:
        parts.append(f"<h3>{escape(title)}</h3>")
        parts += [_sample(sample) for sample in shown]
    return "\n".join(parts)


def _title(summary: Mapping[str, Any]) -> str:
    return f"{summary['task']}, {summary['data']}"


def _sample(sample: Sample) -> str:
    columns = [("base model", sample.base), ("with the adapter", sample.adapter)]
    if sample.expected is not None:
        columns.append(("expected", sample.expected))
    boxes = "".join(f"<div><b>{head}</b><pre>{escape(text)}</pre></div>" for head, text in columns)
    prompt = f'<div class="ask"><b>prompt</b><pre>{escape(sample.prompt)}</pre></div>'
    return f'{prompt}<div class="pair">{boxes}</div>'


def _loading(run: Run) -> str:
    path = run.path
    base = run.config.get("base_model") or run.config["model"]
    blocks = [
        ("Here, on MLX", f"tlora generate {path} --prompt '…'"),
        (
            "In Python",
            "from mlx_lm import generate\nfrom tlora_mlx import load_run\n\n"
            f"base = load_run({str(path)!r})\n"
            "print(generate(base.model, base.tokenizer, prompt='…'))",
        ),
        ("For everyone else: PEFT", f"tlora export {path} --format peft --output {path}-peft"),
        (
            "There",
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({base!r})\n"
            f"model = PeftModel.from_pretrained(model, {str(path) + '-peft'!r})",
        ),
    ]
    inside = "".join(f"<p>{escape(t)}:</p><pre>{escape(code)}</pre>" for t, code in blocks)
    return f"<h2>Load the adapter</h2>{inside}"


def _options(run: Run) -> str:
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>"
        for key, value in run.config.items()
        if value is not None
    )
    return f"<details><summary>All options of the run</summary><table>{rows}</table></details>"
