"""The numbers and texts on the page of a run; ``templates/page.html.j2`` lays it out."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from tlora_mlx.data.sources import names_of
from tlora_mlx.errors import counted
from tlora_mlx.method.allocation import ModulePlan
from tlora_mlx.reporting.charts import heat_map, is_finite, line_chart, short
from tlora_mlx.reporting.evaluations import Completion, Evaluation, metric_rows
from tlora_mlx.reporting.plan_grid import plan_grid
from tlora_mlx.reporting.rendering import render
from tlora_mlx.runs.rates import RateSearch

if TYPE_CHECKING:
    from tlora_mlx.adapters.adapter import Adapter
    from tlora_mlx.evaluation.survival import Survival
    from tlora_mlx.method.energy import CapturedEnergy

Reports = Sequence[Mapping[str, Any]]


class _Card(NamedTuple):
    value: str
    label: str


class _Snippet(NamedTuple):
    title: str
    code: str


def page(
    adapter: Adapter,
    reports: Reports,
    energies: Mapping[str, CapturedEnergy],
    evaluations: Sequence[Evaluation],
    samples: Sequence[Completion],
    rates: RateSearch | None = None,
    survival: Survival | None = None,
) -> str:
    """Write the whole page.

    Args:
        adapter: the run.
        reports: the lines of its ``metrics.jsonl``.
        energies: how much of the energy of W·C each module's A captures; empty if unknown.
        evaluations: what to show under "Evaluation", with the samples of each.
        samples: prompts from the run's own data.
        rates: how the learning rate was found, if it was not given.
        survival: what is left of the adapter in a quantized export; None: leave it out.

    Returns:
        HTML in which everything from the run is escaped.
    """
    groups = [("prompts from the run's own data", samples)]
    groups += [(evaluation.title, evaluation.samples) for evaluation in evaluations]
    html = render(
        "page.html.j2",
        name=adapter.directory.resolve().name,
        model=_without_place(adapter.model),
        data=", ".join(map(_without_place, names_of(adapter.config.get("data")))) or "unknown data",
        cards=_cards(adapter, reports) + _survival_cards(survival),
        energies_known=bool(energies),
        heat_maps=_heat_maps(adapter, energies, survival),
        charts=_charts(reports) + _rate_charts(rates),
        metrics=metric_rows(evaluations) if evaluations else None,
        watched=_watched(reports),
        sample_groups=[(title, shown) for title, shown in groups if shown],
        snippets=_snippets(adapter),
        options=[(k, _without_place(v)) for k, v in adapter.config.items() if v is not None],
    )
    # Half a surrogate pair, from a file name or escaped in JSON, cannot be written as UTF-8.
    return f"{html}\n".encode(errors="replace").decode()


def _watched(reports: Reports) -> list[tuple[str, list[tuple[Any, str]]]]:
    """Each prompt of ``--sample-prompts`` with the iterations and the answers at them."""
    found: dict[str, list[tuple[Any, str]]] = {}
    for report in reports:
        samples = report.get("samples")
        for sample in samples if isinstance(samples, list) else []:
            if isinstance(sample, dict) and {"prompt", "answer"} <= sample.keys():
                place = report.get("iteration"), str(sample["answer"])
                found.setdefault(str(sample["prompt"]), []).append(place)
    return list(found.items())


def points(reports: Reports, key: str) -> list[tuple[float, float]]:
    """(iteration, value) for every report that has a finite value."""
    return [
        (report["iteration"], report[key])
        for report in reports
        if is_finite(report.get(key))
        and is_finite(report.get("iteration"))
        and isinstance(report["iteration"], int)
    ]


def norm(tensor: Any) -> float:
    """The Frobenius norm of an MLX array."""
    import mlx.core as mx

    return mx.sqrt(mx.square(tensor.astype(mx.float32)).sum()).item()


def _cards(adapter: Adapter, reports: Reports) -> list[_Card]:
    cards = []
    for name, key in (("validation loss", "val_loss"), ("test loss", "test_loss")):
        losses = [loss for _, loss in points(reports, key)]
        if len(losses) > 1:
            change = f"{losses[0]:.3f} → {min(losses[1:]):.3f}"
            cards.append(_Card(change, f"{name}, before → after"))
    plan = adapter.plan
    cards.append(_Card(f"{len(plan.adapted())} of {len(plan.modules)}", "modules adapted"))
    cards.append(_Card(short(plan.trained_parameters()), "trained parameters"))
    cards.append(_Card(f"{plan.rank} / {plan.alpha:g}", "base rank / alpha"))
    if iterations := points(reports, "iteration"):
        cards.append(_Card(f"{iterations[-1][0]}", "iterations"))
    if tokens := points(reports, "trained_tokens"):
        cards.append(_Card(short(tokens[-1][1]), "tokens trained on"))
    if speed := points(reports, "tokens_per_second"):
        cards.append(_Card(short(median(y for _, y in speed)), "tokens/s, median"))
    if memory := points(reports, "peak_memory"):
        cards.append(_Card(f"{max(y for _, y in memory):.2f} GB", "peak memory"))
    return cards


def _survival_cards(survival: Survival | None) -> list[_Card]:
    if survival is None:
        return []
    losses = survival.losses
    kept = "–" if losses.kept is None else f"{losses.kept:.1%}"
    bits = survival.bits
    return [
        _Card(kept, "of the improvement left, quantized again"),
        _Card(
            f"{losses.base:.3f} → {losses.merged:.3f}",
            f"loss on {losses.measured}, base → quantized again; adapter {losses.adapter:.3f}",
        ),
        *([_Card(f"{bits.per_weight:.2f}", f"bits per weight: {bits.summary()}")] if bits else []),
    ]


def loss_chart(reports: Reports) -> Markup | None:
    """Training and validation loss over iterations; None if there are none."""
    losses = {
        "training": points(reports, "train_loss"),
        "validation": points(reports, "val_loss"),
    }
    if not any(losses.values()):
        return None
    return line_chart(losses, "iteration", "loss (nats per token)")


def _charts(reports: Reports) -> list[Markup]:
    losses = loss_chart(reports)
    charts = [] if losses is None else [losses]
    for key, label in (
        ("learning_rate", "learning rate"),
        ("tokens_per_second", "throughput (tokens per second)"),
        ("peak_memory", "peak memory (GB)"),
        ("grad_norm", "gradient norm"),
    ):
        if values := points(reports, key):
            charts.append(line_chart({label: values}, "iteration", label))
    return charts


def _rate_charts(rates: RateSearch | None) -> list[Markup]:
    if rates is None:
        return []
    tried = [(math.log10(t.rate), t.loss) for t in rates.trials if t.loss is not None]
    after = counted(rates.updates, "update")
    label = f"validation loss after {after}, by rate; taken: {rates.recommended:.2g}"
    return [line_chart({label: tried}, "learning rate, as a power of ten", label)]


def _heat_maps(
    adapter: Adapter, energies: Mapping[str, CapturedEnergy], survival: Survival | None
) -> list[Markup]:
    plan = adapter.plan
    rows, columns, names = plan_grid(plan)

    def rank(name: str, module: ModulePlan) -> tuple[float, str]:
        return module.rank, f"{module.rank} × {module.scale:.3g}" if module.rank else "–"

    def sensitivity(name: str, module: ModulePlan) -> tuple[float, str]:
        return module.sensitivity, f"{module.sensitivity:.1e}"

    def update(name: str, module: ModulePlan) -> tuple[float, str] | None:
        if not module.rank:
            return None
        size = module.scale * norm(adapter.tensors[f"{name}.lora_b"])
        return size, short(round(size, 3))

    def energy(name: str, module: ModulePlan) -> tuple[float, str] | None:
        found = energies.get(name)
        return found and (found.total, f"{found.total:.1%}")

    def beyond(name: str, module: ModulePlan) -> tuple[float, str] | None:
        found = energies.get(name)
        if found is None or found.beyond is None:
            return None
        return found.beyond, f"{found.beyond:.1%}" + f" ({found.leading})" * (found.leading > 0)

    def output_error(name: str, module: ModulePlan) -> tuple[float, str] | None:
        error = survival.output_errors.get(name)
        return None if error is None else (error, f"{error:.2f}")

    def drawn(
        title: str,
        show: Callable[[str, ModulePlan], tuple[float, str] | None],
        color: Callable[[float], float] = lambda value: value,
    ) -> Markup:
        cells = {}
        for place, name in names.items():
            module = plan.modules[name]
            if (shown := show(name, module)) is not None:
                cells[place] = (*shown, _hint(name, module, energies.get(name)))
        return heat_map(title, rows, columns, cells, color)

    ranks = sum(module.rank for module in plan.modules.values())
    maps = [
        drawn(f"rank (× scale); total rank {ranks}", rank),
        drawn(
            "sensitivity, mean |W ⊙ ∂loss/∂W| (colours on a log scale)",
            sensitivity,
            lambda value: math.log10(max(value, 1e-30)),
        ),
        drawn("size of the trained update, ‖scale · B‖", update),
    ]
    if energies:
        maps.append(drawn("energy of W·C that A captures", energy))
    if any(found.leading for found in energies.values()):
        title = "of the energy behind the leading directions (their number) of W·C, what A captures"
        maps.append(drawn(title, beyond))
    if survival:
        title = "quantized again: error of the outputs by rounding, of what the adapter changes"
        maps.append(drawn(title, output_error))
    return maps


def _hint(name: str, module: ModulePlan, energy: CapturedEnergy | None) -> str:
    hint = (
        f"{name}: {module.out_features} × {module.in_features}, rank {module.rank}, scale "
        f"{module.scale:.4g}, sensitivity {module.sensitivity:.3e}"
    )
    if energy is None:
        return hint
    hint += f", captured energy {energy.total:.2%}"
    if energy.leading and energy.beyond is not None:
        hint += f", {energy.beyond:.2%} without the {energy.leading} leading directions"
    return hint


def _without_place(value: Any) -> Any:
    """A value with the names of files and directories, but not where they are: pages are shared."""
    if isinstance(value, Mapping):
        return {key: _without_place(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_place(item) for item in value]
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def _snippets(adapter: Adapter) -> list[_Snippet]:
    path = adapter.directory.resolve().name
    exported = f"{path}-peft"
    return [
        _Snippet("Here, on MLX", f"tlora generate {shlex.quote(path)} --prompt '…'"),
        _Snippet(
            "In Python",
            "from mlx_lm import generate\nfrom tlora_mlx import load_adapter\n\n"
            f"base = load_adapter({path!r})\n"
            "print(generate(base.model, base.tokenizer, prompt='…'))",
        ),
        _Snippet(
            "For everyone else: PEFT",
            f"tlora export {shlex.quote(path)} --format peft --output {shlex.quote(exported)}",
        ),
        _Snippet(
            "On the other side",
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({adapter.base!r})\n"
            f"model = PeftModel.from_pretrained(model, {exported!r})",
        ),
    ]
