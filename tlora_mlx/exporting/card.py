"""The model card of an export: what it is, how to load it, and how it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tlora_mlx.exporting.loading import Export
from tlora_mlx.files import write_text
from tlora_mlx.run_directory import METRICS, Run

if TYPE_CHECKING:
    from tlora_mlx.method.allocation import RankPlan

CARD = "README.md"
PICTURE = "rank_plan.png"
# The options of a run that say how it was trained. None of them is a path: nothing of the user's
# machine goes into a card but the name of the data's directory.
SETTINGS = ("rank", "alpha", "max_rank", "target_modules", "num_layers", "calibration_samples")
SETTINGS += ("iters", "epochs", "batch_size", "grad_accumulation_steps", "max_seq_length")
SETTINGS += ("mask_prompt", "optimizer", "learning_rate", "lr_schedule", "warmup", "weight_decay")
SETTINGS += ("max_grad_norm", "val_split", "early_stop", "seed")
PAPER = "https://arxiv.org/abs/2604.18124"
HOME = "https://github.com/tlora-mlx/tlora_mlx"


def is_repository(name: str) -> bool:
    """Whether a name is one of the Hub's, and no directory of this machine."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def write_card(
    directory: Path,
    run: Run,
    format: str,
    base_model: str | None = None,
    repository: str | None = None,
) -> None:
    """Write ``README.md`` and, with matplotlib, ``rank_plan.png`` into an exported directory.

    Args:
        directory: the export, complete but for its card.
        run: what was exported.
        format: ``peft``, ``mlx-lm`` or ``merged``.
        base_model: what the export is for; the run's own base where it is None.
        repository: where it will be on the Hub, for the card's code; without one, that loads the
            directory by its name.

    Raises:
        RunError: it could not be written.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from tlora_mlx.pictures import can_draw, draw_plan

    base = base_model or run.config.get("base_model") or run.config["model"]
    name = repository or directory.resolve().name
    trained_on = base_model or run.config["model"]
    export = Export(directory, format, name, _shown(base), _shown(trained_on))
    data = run.config.get("data")
    metadata = ModelCardData(
        base_model=base if is_repository(base) else None,
        base_model_relation="finetune" if format == "merged" else "adapter",
        library_name=export.library,
        pipeline_tag="text-generation",
        tags=["tlora", "tlora_mlx", *([] if format == "merged" else ["lora"])],
        datasets=[data] if isinstance(data, str) and is_repository(data) else None,
        **_of_the_base((base, run.config["model"])),
    )
    if can_draw():
        draw_plan(run.plan, directory / PICTURE)
    origin = f"[{base}](https://huggingface.co/{base})" if is_repository(base) else _shown(base)
    method = f"[TLoRA]({PAPER}) (task-aware LoRA)"
    what = f"{origin}, fine-tuned by {method}"
    if format != "merged":
        what = f"A {method} adapter of {origin}, trained"
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {name.rsplit('/', 1)[-1]}\n",
        f"{what} with [tlora_mlx]({HOME}). LoRA's A is set from the training data and frozen, B is "
        "trained, and each module's rank and scale follow its sensitivity.\n",
        "## How to load it\n",
        *export.loading(),
        "## Rank plan\n",
        *_plan(run.plan, f"![rank of each module]({PICTURE})\n" if can_draw() else None),
        "## Training\n",
        *_training(run),
    ]
    write_text(directory / CARD, str(ModelCard("\n".join(parts))))


def _shown(base: str) -> str:
    """A base model's name for readers: of a directory, its own name without the way to it."""
    return base if is_repository(base) else Path(base).name


def _of_the_base(names: tuple[str, ...]) -> dict[str, Any]:
    """Licence and language, from the first base whose card is on this machine and has any."""
    facts = ("license", "license_name", "license_link", "language")
    for name in names:
        card = _front_matter(name)
        found = {key: card[key] for key in facts if _is_text(card.get(key))}
        link = found.get("license_link")
        if isinstance(link, str) and not link.startswith("http"):  # a file of the base's own
            del found["license_link"]
            if is_repository(name):
                found["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
        if found:
            return found
    return {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def _front_matter(base: str) -> dict[str, Any]:
    """The metadata of a base model's card, where the card is on this machine."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    card = try_to_load_from_cache(base, CARD) if is_repository(base) else str(Path(base) / CARD)
    try:
        return (isinstance(card, str) and metadata_load(card)) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _table(heading: list[str], rows: list[list[Any]]) -> str:
    def line(cells: list[Any]) -> str:
        texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(heading), "|---" * len(heading) + "|", *map(line, rows)]) + "\n"


def _plan(plan: RankPlan, picture: str | None) -> list[str]:
    """The plan as blocks × module kinds, each with rank × scale."""
    from tlora_mlx.training.progress import plan_cell, plan_grid

    blocks, kinds, cells = plan_grid(plan)
    rows = [[b, *(plan_cell(plan, cells.get((b, kind))) for kind in kinds)] for b in blocks]
    return [
        f"Rank × scale of each module. {len(plan.adapted())} of {len(plan.modules)} modules are "
        f"adapted, {plan.trained_parameters():,} parameters were trained.\n",
        _table(["block", *kinds], rows),
        *([picture] if picture else []),
    ]


def _training(run: Run) -> list[str]:
    """Data, losses, settings and versions, as far as the run tells."""
    parts, data, reports = [], run.config.get("data"), _reports(run.path / METRICS)
    if isinstance(data, str):
        tokens = max((r.get("trained_tokens") or 0 for r in reports), default=0)
        counted = f"; {tokens:,} tokens counted in the loss" if tokens else ""
        where = f"the directory `{Path(data).name}`"
        if is_repository(data):
            where = f"[{data}](https://huggingface.co/datasets/{data})"
        parts.append(f"Data: {where}{counted}.\n")
    if losses := _losses(reports):
        parts.append(_table(["loss (nats per token)", "iteration", "value"], losses))
    settings = [
        [f"`--{name.replace('_', '-')}`", run.config[name]]
        for name in SETTINGS
        if run.config.get(name) is not None
    ]
    if settings:
        parts.append(_table(["setting", "value"], settings))
    versions = run.config.get("versions")
    if isinstance(versions, dict):
        parts.append(f"Made with {', '.join(f'{k} {v}' for k, v in versions.items())}.\n")
    return parts


def _reports(metrics: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``metrics.jsonl``; a crash may have cut the last one short."""
    reports = []
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        try:
            reports.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [report for report in reports if isinstance(report, dict) and "iteration" in report]


def _losses(reports: list[dict[str, Any]]) -> list[list[Any]]:
    def known(key: str) -> list[dict[str, Any]]:
        return [r for r in reports if isinstance(r.get(key), (int, float))]

    train, validation, test = known("train_loss"), known("val_loss"), known("test_loss")
    chosen = [("training, at the end", r, "train_loss") for r in train[-1:]]
    if validation:
        best = min(validation, key=lambda r: r["val_loss"])
        chosen += [("validation, first", validation[0], "val_loss")]
        chosen += [("validation, lowest: the adapter that was kept", best, "val_loss")]
    if len(test) > 1:
        chosen += [("test, before", test[0], "test_loss"), ("test, after", test[-1], "test_loss")]
    return [[what, report["iteration"], f"{report[key]:.4f}"] for what, report, key in chosen]
