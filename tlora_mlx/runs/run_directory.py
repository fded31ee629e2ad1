"""The files in a run directory, and the options that a run was started with."""

from __future__ import annotations

from typing import Any

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.distributed.collectives import from_first, is_first
from tlora_mlx.errors import UserError
from tlora_mlx.storage.files import read_json, user_path
from tlora_mlx.storage.foreign import file_in

CONFIG = "adapter_config.json"
PLAN = "rank_plan.json"
ENERGIES = "captured_energy.json"
ADAPTERS = "adapters.safetensors"
RATES = "learning_rates.json"
METRICS = "metrics.jsonl"
LOSSES = "loss.png"
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"


def with_stored_options(given: dict[str, Any]) -> dict[str, Any]:
    """With ``resume``, options that were not given are those of the run in ``adapter_path``.

    Under ``mlx.launch`` the first process reads the directory and sends them to the others.

    Args:
        given: options by their YAML names.

    Raises:
        UserError: the run's configuration is damaged, or there is no run, nor options to start one.
    """
    if not given.get("resume"):
        return given
    known = TrainConfig.__dataclass_fields__
    path = file_in(user_path(given.get("adapter_path", known["adapter_path"].default)), CONFIG)
    found = is_first() and path.exists()
    stored = from_first(read_json(path, "the run's configuration") if found else None)
    if stored is None:
        if not {"model", "data"} <= given.keys():
            raise UserError(f"--resume: there is no run in {path.parent}")
        return given
    if not isinstance(stored, dict):
        raise UserError(f"the run's configuration {path} is damaged; start another run")
    return {name: value for name, value in stored.items() if name in known} | given
