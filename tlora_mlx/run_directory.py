"""The run directory: its files, and how a run is loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora_mlx.errors import UserError
from tlora_mlx.files import read_json, user_path
from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.method.layers import adapter_faults, attach
from tlora_mlx.tensor_file import TensorFile

if TYPE_CHECKING:
    import mlx.core as mx

    from tlora_mlx.base_model import BaseModel

CONFIG = "adapter_config.json"
PLAN = "rank_plan.json"
ENERGIES = "captured_energy.json"
ADAPTERS = "adapters.safetensors"
METRICS = "metrics.jsonl"
LOSSES = "loss.png"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Run:
    """What a run directory holds, checked.

    Attributes:
        tensors: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out) per adapted module,
            read from the file when they are asked for.
    """

    path: Path
    config: dict[str, Any]
    plan: RankPlan
    tensors: Mapping[str, mx.array]


def read_run(path: str | Path) -> Run:
    """Read a run directory without its base model.

    Args:
        path: what ``train`` or ``export_run`` made.

    Returns:
        The run; its tensors are read from the file when they are asked for.

    Raises:
        UserError: it is no run directory, or a file is missing, damaged or does not fit the plan;
            all tensors at fault are named.
    """
    path = user_path(path)
    if not path.is_dir():
        raise UserError(f"run directory {path} does not exist")
    config = read_json(path / CONFIG, "the run's configuration")
    if not isinstance(config, dict) or config.get("fine_tune_type") != "tlora":
        raise UserError(f"{path} is no run of tlora_mlx.train: {CONFIG} is another tool's")
    missing = [key for key in ("model", "model_type") if not isinstance(config.get(key), str)]
    if missing:
        raise UserError(f"{path / CONFIG} has no {' and no '.join(map(repr, missing))}")
    if not isinstance(config.get("base_model"), (str, type(None))):
        raise UserError(f"'base_model' in {path / CONFIG} is no name")
    if type(config.get("num_layers", -1)) is not int:
        raise UserError(f"'num_layers' in {path / CONFIG} is no whole number")
    try:
        plan = RankPlan.from_dict(read_json(path / PLAN, "the run's rank plan"))
    except ValueError as error:
        raise UserError(f"the rank plan {path / PLAN} is not right: {error}") from None
    tensors = TensorFile(path / ADAPTERS, "the run's adapter")
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

    A PEFT LoRA adapter or an mlx-lm adapter is loaded just so, on the base model that it names.

    Args:
        path: the run, or the adapter.
        trust_remote_code: let the model's repository run its own code.

    Returns:
        The base model in evaluation mode, whose adapted layers are ``TLoRALinear``, or the like of
        it for experts.

    Raises:
        UserError: the run or its base model cannot be loaded, or they do not fit each other.
    """
    from tlora_mlx.base_model import load_base_model
    from tlora_mlx.importing.read import read_as_run

    run = read_as_run(path)
    base = load_base_model(run.config["model"], trust_remote_code)
    try:
        attach(base.model, run.plan, run.tensors)
    except ValueError as error:
        raise UserError(f"run {path} does not fit model {base.name}: {error}") from None
    base.model.eval()
    return base
