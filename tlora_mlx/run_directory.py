"""The run directory: its files, how they are written, and how a run is loaded again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora_mlx.config import TrainConfig
from tlora_mlx.errors import RunError, UserError
from tlora_mlx.files import new_directory, read_json, read_tensors, write_json, write_tensors
from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.method.layers import adapter_faults, adapter_tensors, attach
from tlora_mlx.version import __version__

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from tlora_mlx.base_model import BaseModel

CONFIG = "adapter_config.json"
PLAN = "rank_plan.json"
ADAPTERS = "adapters.safetensors"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


class RunWriter:
    """Writes one run's directory; nothing is made before ``create``.

    Raises (on construction):
        UserError: the directory holds another run, or is no directory.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_dir():
            raise UserError(f"--adapter-path {path} is a file; choose a directory")
        held = [n for n in (CONFIG, PLAN, ADAPTERS, CHECKPOINTS) if (path / n).exists()]
        if (path / METRICS).exists() and (path / METRICS).stat().st_size:
            held.append(METRICS)
        if held:
            raise UserError(
                f"--adapter-path {path} holds another run ({', '.join(held)}); choose another "
                "directory or delete that one"
            )

    def create(self) -> None:
        """Make the directory and see that it can be written to, before anything takes long.

        Raises:
            RunError: it cannot.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / METRICS).write_text("")
        except OSError as error:
            raise RunError(
                f"cannot write to --adapter-path {self.path}: {error.strerror}"
            ) from None

    def start(self, config: TrainConfig, base: BaseModel, plan: RankPlan) -> None:
        """Write the plan and the configuration; from here on the directory is a run's."""
        write_json(self.path / PLAN, plan.to_dict())
        write_json(
            self.path / CONFIG,
            {
                "fine_tune_type": "tlora",
                "model_type": base.config["model_type"],
                "base_model": base.original,
                "versions": {
                    "tlora_mlx": __version__,
                    **{package: version(package) for package in ("mlx", "mlx-lm", "transformers")},
                },
                **config.to_dict(),
                "model": base.name,
            },
        )

    def report(self, metrics: dict[str, float]) -> None:
        """Append one report to ``metrics.jsonl``."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def checkpoint(self, model: nn.Module, iteration: int) -> None:
        """Save the adapter as it is after so many updates, under ``checkpoints/``."""
        path = self.path / CHECKPOINTS / f"{iteration:07d}"
        with new_directory(path) as beside:
            write_tensors(beside / ADAPTERS, adapter_tensors(model), {"format": "mlx"})

    def finish(self, model: nn.Module) -> None:
        """Save the adapter: A and B, complete by itself."""
        write_tensors(self.path / ADAPTERS, adapter_tensors(model), {"format": "mlx"})


@dataclass(frozen=True)
class Run:
    """What a run directory holds, checked.

    Attributes:
        tensors: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out) per adapted module.
    """

    path: Path
    config: dict[str, Any]
    plan: RankPlan
    tensors: dict[str, mx.array]


def read_run(path: str | Path) -> Run:
    """Read a run directory without its base model.

    Raises:
        UserError: it is no run directory, or a file is missing, damaged or does not fit the plan;
            all tensors at fault are named.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"run directory {path} does not exist")
    config = read_json(path / CONFIG, "the run's configuration")
    if not isinstance(config, dict) or config.get("fine_tune_type") != "tlora":
        raise UserError(f"{path} is no run of tlora_mlx.train: {CONFIG} is another tool's")
    missing = [key for key in ("model", "model_type") if not isinstance(config.get(key), str)]
    if missing:
        raise UserError(f"{path / CONFIG} has no {' and no '.join(map(repr, missing))}")
    try:
        plan = RankPlan.from_dict(read_json(path / PLAN, "the run's rank plan"))
    except ValueError as error:
        raise UserError(f"the rank plan {path / PLAN} is not right: {error}") from None
    tensors = read_tensors(path / ADAPTERS, "the run's adapter")
    shapes = {name: (m.out_features, m.in_features) for name, m in plan.modules.items()}
    faults = adapter_faults(plan, tensors, shapes)
    faults += [
        f"{name}.lora_b is missing" for name in plan.adapted() if f"{name}.lora_b" not in tensors
    ]
    if faults:
        raise UserError(f"the adapter {path / ADAPTERS} does not fit its plan: {'; '.join(faults)}")
    return Run(path, config, plan, tensors)


def load_run(path: str | Path, trust_remote_code: bool = False) -> BaseModel:
    """Load a run's base model with its adapter attached, ready to generate or evaluate.

    Raises:
        UserError: the run or its base model cannot be loaded, or they do not fit each other.
    """
    from tlora_mlx.base_model import load_base_model

    run = read_run(path)
    base = load_base_model(run.config["model"], trust_remote_code)
    try:
        attach(base.model, run.plan, run.tensors)
    except ValueError as error:
        raise UserError(f"run {path} does not fit model {base.name}: {error}") from None
    base.model.eval()
    return base
