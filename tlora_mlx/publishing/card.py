"""The model card of an export: what it is, how to load it, and how it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.data.sources import names_of
from tlora_mlx.errors import counted
from tlora_mlx.evaluation.survival import read_survival
from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.models.model_directory import front_matter
from tlora_mlx.publishing.instructions import EXPORTS, Export
from tlora_mlx.reporting import pictures
from tlora_mlx.reporting.charts import is_finite
from tlora_mlx.reporting.plan_grid import experts_summed, plan_cell, plan_grid
from tlora_mlx.runs.metrics import read_lines
from tlora_mlx.runs.run_directory import METRICS
from tlora_mlx.storage.files import write_text
from tlora_mlx.storage.foreign import file_in
from tlora_mlx.storage.hub_names import is_repository

CARD = "README.md"
PICTURE = "rank_plan.png"
PAPER = "https://arxiv.org/abs/2604.18124"
PROJECT = "https://github.com/tlora-mlx/tlora_mlx"
# The options that describe how a run was trained. None of them is a path: the only thing from the
# user's machine that a card may show is the name of the data directory.
SETTINGS = (
    "rank", "alpha", "max_rank", "target_modules", "num_layers", "calibration_samples",
    "iters", "epochs", "batch_size", "grad_accumulation_steps", "max_seq_length",
    "mask_prompt", "optimizer", "learning_rate", "lr_schedule", "warmup", "weight_decay",
    "max_grad_norm", "val_split", "early_stop", "seed",
)  # fmt: skip
# What a card copies from the base model's card.
BASE_MODEL_FACTS = ("license", "license_name", "license_link", "language")


def write_card(
    directory: Path,
    adapter: Adapter,
    format: str,
    base_model: str | None = None,
    name: str | None = None,
) -> None:
    """Write ``README.md`` and, with matplotlib, ``rank_plan.png`` into an exported directory.

    Args:
        directory: the export, complete except for its card.
        adapter: what was exported.
        format: the export's format, a key of ``publishing.instructions.EXPORTS``.
        base_model: the model that the export is for; None: the adapter's own base model.
        name: what the card's code loads it by: its repository on the Hub, or the final name of the
            directory; None: that of ``directory``.

    Raises:
        UserError: the export's configuration is missing or not JSON.
        RunError: the card could not be written.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = base_model or adapter.base
    trained_on = base_model or adapter.model
    name = name or directory.resolve().name
    export = EXPORTS[format](
        directory, name, _display_name(base), _display_name(trained_on), adapter.model_type
    )
    data = [_repository(name) for name in names_of(adapter.config.get("data"))]
    metadata = ModelCardData(
        base_model=base if is_repository(base) else None,
        base_model_relation=export.relation,
        library_name=export.library,
        pipeline_tag="text-generation",
        tags=[*([] if _is_derived(adapter) else ["tlora"]), "tlora_mlx", *export.tags],
        datasets=[name for name in data if name] or None,
        **_base_model_facts((base, adapter.model)),
    )
    picture = pictures.can_draw()
    if picture:
        pictures.draw_plan(adapter.plan, directory / PICTURE)
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {name.rsplit('/', 1)[-1]}\n",
        f"{_intro(adapter, export, base)}\n",
        "## How to load it\n",
        *export.loading(),
        *_survival(directory),
        "## Rank plan\n",
        *_plan(adapter.plan),
        *([f"![rank of each module]({PICTURE})\n"] if picture else []),
        "## Training\n",
        *_training(adapter),
    ]
    write_text(directory / CARD, str(ModelCard("\n".join(parts))))


def _display_name(model: str) -> str:
    """A model's name as readers see it; for a directory, only its last part."""
    return model if is_repository(model) else Path(model).name


def _base_model_facts(names: tuple[str, ...]) -> dict[str, Any]:
    """Licence and language, from the first model whose card is on this machine and has them."""
    for name in names:
        card = _front_matter(name)
        found = {key: card[key] for key in BASE_MODEL_FACTS if _is_text(card.get(key))}
        link = found.get("license_link")
        if isinstance(link, str) and not link.startswith("http"):  # a file beside the base model
            del found["license_link"]
            if is_repository(name):
                found["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
        if found:
            return found
    return {}


def _is_text(value: Any) -> bool:
    """Whether a value of the front matter is a string or a list of strings."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def _front_matter(model: str) -> dict[str, Any]:
    """The metadata of a model's card; empty if the card is damaged or not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(model, CARD) if is_repository(model) else str(Path(model) / CARD)
    return front_matter(Path(card)) if isinstance(card, str) else {}


def _table(heading: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; line breaks and bars in its cells are handled."""

    def line(cells: list[Any]) -> str:
        texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(heading), "|---" * len(heading) + "|", *map(line, rows)]) + "\n"


def _plan(plan: RankPlan) -> list[str]:
    """The plan as blocks × module kinds, each with rank × scale."""
    shown = experts_summed(plan)
    blocks, kinds, cells = plan_grid(shown)
    rows = [[b, *(plan_cell(shown, cells.get((b, kind))) for kind in kinds)] for b in blocks]
    return [
        f"Rank × scale of each module. {len(plan.adapted())} of {len(plan.modules)} modules are "
        f"adapted, {plan.trained_parameters():,} parameters were trained.\n",
        _table(["block", *kinds], rows),
    ]


def _survival(directory: Path) -> list[str]:
    """What is left of the adapter in a model that was rounded by the task; empty for others."""
    survival = read_survival(directory)
    if survival is None:
        return []
    losses, errors = survival.losses, survival.output_errors
    kept = "" if losses.kept is None else f"{losses.kept:.1%} of the improvement is left. "
    losses_of = {
        "without the adapter": losses.base,
        "with the adapter, in full precision": losses.adapter,
        "this model": losses.merged,
    }
    parts = [
        "## What is left of the adapter\n",
        f"{kept}The weights are quantized, with errors that make up for each other where the "
        f"task's loss depends on them. Measured on {losses.measured}, "
        "in nats per token:\n",
        _table(["model", "loss"], [[name, f"{loss:.4f}"] for name, loss in losses_of.items()]),
    ]
    if survival.bits:
        parts.append(f"Bits were chosen by what the loss minds: {survival.bits.summary()}.\n")
    if plain := len(survival.rounded_to_nearest):
        every = plain + len(errors)
        parts.append(
            f"Rounded to nearest, not by the task: {plain} of {counted(every, 'module')} (experts, "
            "not quantized, or without effect on the loss).\n"
        )
    if worst := sorted(errors, key=errors.get, reverse=True)[:5]:
        parts += [
            "The modules in whose outputs rounding made the largest errors, relative to what the "
            "adapter changes in them and weighted by what the loss depends on:\n",
            _table(["module", "error"], [[f"`{name}`", f"{errors[name]:.3f}"] for name in worst]),
        ]
    return parts


def _is_derived(adapter: Adapter) -> bool:
    """Whether its A is not TLoRA's: from another tool, combined, or from an earlier adapter."""
    return bool(adapter.config.get("made_from") or adapter.config.get("from_adapter"))


def _intro(adapter: Adapter, export: Export, base: str) -> str:
    """What the export is and where it comes from."""
    tool = f"[tlora_mlx]({PROJECT})"
    if is_repository(base):
        base_link = f"[{base}](https://huggingface.co/{base})"
    else:
        base_link = _display_name(base)
    if made_from := adapter.config.get("made_from"):
        how = "combined from several" if "combine" in made_from else "converted from another format"
        return f"{export.described(base_link)}, {how} with {tool}."
    if _is_derived(adapter):
        return (
            f"{export.described(base_link)}, trained further from an earlier one with {tool}: "
            "A frozen, B trained."
        )
    method = f"[TLoRA]({PAPER}) (task-aware LoRA)"
    return (
        f"{export.described_as_trained(base_link, method)} with {tool}. LoRA's A is set from the "
        "training data and frozen, B is trained, and each module's rank and scale follow its "
        "sensitivity."
    )


def _training(adapter: Adapter) -> list[str]:
    """Data, losses, settings and versions, as far as known."""
    parts, data, reports = [], names_of(adapter.config.get("data")), _reports(adapter.directory)
    if data:
        counts = [r["trained_tokens"] for r in reports if is_finite(r.get("trained_tokens"))]
        tokens = max(counts, default=0)
        learnt = f"; {tokens:,} tokens counted in the loss" if tokens else ""
        parts.append(f"Data: {', '.join(map(_data_link, data))}{learnt}.\n")
    if losses := _losses(reports):
        parts.append(_table(["loss (nats per token)", "iteration", "value"], losses))
    settings = [
        [f"`--{name.replace('_', '-')}`", adapter.config[name]]
        for name in SETTINGS
        if adapter.config.get(name) is not None
    ]
    if settings:
        parts.append(_table(["setting", "value"], settings))
    versions = adapter.config.get("versions")
    if isinstance(versions, dict):
        parts.append(f"Made with {', '.join(f'{k} {v}' for k, v in versions.items())}.\n")
    return parts


def _data_link(name: str) -> str:
    """A Hub data set with a link; of a file or directory, only its name."""
    if repository := _repository(name):
        return f"[{name}](https://huggingface.co/datasets/{repository})"
    return f"the {'file' if Path(name).suffix else 'directory'} `{Path(name).name}`"


def _repository(name: str) -> str | None:
    """The Hub repository of a data set named NAME or NAME:CONFIGURATION; None: it is local."""
    repository = name.partition(":")[0]
    return repository if is_repository(repository) and not Path(name).exists() else None


def _reports(directory: Path | None) -> list[dict[str, Any]]:
    """The metrics of the run in a directory; none for an adapter that is not a run.

    Damaged lines are skipped: a complete export should not fail because of its card.
    """
    reports = read_lines(file_in(directory, METRICS), skip_damaged=True) if directory else []
    return [report for report in reports if is_finite(report.get("iteration"))]


def _losses(reports: list[dict[str, Any]]) -> list[list[Any]]:
    def known(key: str) -> list[dict[str, Any]]:
        return [r for r in reports if is_finite(r.get(key))]

    train, validation, test = known("train_loss"), known("val_loss"), known("test_loss")
    chosen = [("training, at the end", r, "train_loss") for r in train[-1:]]
    if validation:
        best = min(validation, key=lambda r: r["val_loss"])
        chosen += [("validation, first", validation[0], "val_loss")]
        chosen += [("validation, lowest (the adapter that was kept)", best, "val_loss")]
    if len(test) > 1:
        chosen += [("test, before", test[0], "test_loss"), ("test, after", test[-1], "test_loss")]
    return [[what, report["iteration"], f"{report[key]:.4f}"] for what, report, key in chosen]
