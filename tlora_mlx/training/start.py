"""What training starts from: a plan and A found by calibration, or an earlier adapter."""

from __future__ import annotations

from tlora_mlx.adapters.binding import drop_zero_ranks
from tlora_mlx.adapters.registry import bind_to_model, read_adapter
from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.method.initialise import Initialisation
from tlora_mlx.models.base_model import BaseModel
from tlora_mlx.models.model_directory import recorded_name
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.training.planning import check_plan, plan_and_initialise
from tlora_mlx.training.setup import Setup


def check_start(config: TrainConfig) -> None:
    """Check the files that a new run starts from before the model is loaded or downloaded.

    Raises:
        UserError: the adapter cannot be read, or the plan's file holds no plan.
    """
    if config.resume:
        return
    if config.plan:
        check_plan(config.plan)
    if config.from_adapter:
        read_adapter(config.from_adapter)


def find_start(config: TrainConfig, setup: Setup, observer: Observer = SILENT) -> Initialisation:
    """The plan and A as configured; from an adapter, its B too.

    Raises:
        UserError: the given plan or adapter cannot be read or does not fit, or a module cannot be
            calibrated.
        RunError: a statistic is not finite.
    """
    if config.from_adapter:
        return _from_adapter(config.from_adapter, setup.base, observer)
    return plan_and_initialise(config, setup, observer)


def _from_adapter(path: str, base: BaseModel, observer: Observer) -> Initialisation:
    """The adapter that training starts from, on the base model.

    Raises:
        UserError: it cannot be read, or does not fit the model; all faults in one message.
    """
    adapter = read_adapter(path)
    if adapter.base and recorded_name(adapter.base) not in (base.name, base.original):
        observer.note(f"warning: {path} was made for {adapter.base}, but --model is {base.name}")
    adapter = drop_zero_ranks(bind_to_model(adapter, base.description()))
    observer.planned(adapter.plan)
    return Initialisation(adapter.plan, adapter.tensors, {})
