"""The rank plan of a run (calibrated, read from a file, or reallocated), and its A."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from rich.filesize import decimal

from tlora_mlx.config.training_options import PlanCommand, PlanConfig, TrainConfig
from tlora_mlx.data.batches import batches_in_order
from tlora_mlx.data.samples import Split, draw_samples
from tlora_mlx.distributed.collectives import from_each, from_first, is_first
from tlora_mlx.errors import RunError, UserError
from tlora_mlx.method.allocation import RankPlan, plan_ranks
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.initialise import Budget, Initialisation, calibrate_and_plan, initialise
from tlora_mlx.method.layers import Linear, linear_shape
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.reporting.pictures import can_draw, draw_plan
from tlora_mlx.storage.files import read_json, user_path, write_json
from tlora_mlx.training.memory import end_stage, machine_memory
from tlora_mlx.training.setup import Setup, prepare


def plan(config: PlanCommand, observer: Observer = SILENT) -> RankPlan:
    """Calibrate and allocate as configured, or reallocate from an earlier plan.

    Args:
        config: the options; nothing is written to ``config.output``.
        observer: notified of the progress.

    Returns:
        Ranks and scales of all target modules.

    Raises:
        UserError: the configuration, the model or the data are invalid.
        RunError: it failed while running.
    """
    if config.sensitivities:
        return reallocate(read_plan(config.sensitivities), config)
    setup = prepare(config, observer)
    batches = calibration_batches(config, setup.data["train"])
    with _failures():
        _, found = calibrate_and_plan(
            setup.base.model, setup.targets, batches, budget(config), observer=observer
        )
    return found


def plan_output(config: PlanCommand) -> Path:
    """Where the plan will be written, checked before anything slow starts.

    Raises:
        UserError: it cannot be written there.
    """
    output = user_path(config.output)
    fits = output.parent.is_dir() and (output.is_file() or not output.exists())
    if is_first() and not fits:
        raise UserError(f"--output {output} must be a file in a directory that exists")
    if output.suffix == ".png":
        raise UserError(f"--output {output} is for the plan's JSON; the .png is written beside it")
    return output


def write_plan(plan: RankPlan, output: Path) -> list[Path]:
    """Write a plan as JSON and, with matplotlib, as a picture; returns the files.

    Under ``mlx.launch`` only the first process writes.
    """
    if not is_first():
        return []
    write_json(output, plan.to_dict())
    return [output] + ([draw_plan(plan, output.with_suffix(".png"))] if can_draw() else [])


def reallocate(earlier: RankPlan, config: PlanCommand) -> RankPlan:
    """Allocate again from an earlier plan's sensitivities, with another rank, alpha or cap.

    Raises:
        UserError: the sensitivities are unusable.
    """
    sensitivities = {name: module.sensitivity for name, module in earlier.modules.items()}
    shapes = {name: (m.out_features, m.in_features) for name, m in earlier.modules.items()}
    try:
        return plan_ranks(sensitivities, shapes, config.rank, config.alpha, config.max_rank)
    except ValueError as error:
        raise UserError(f"the rank plan {config.sensitivities} is invalid: {error}") from None


def budget(config: PlanConfig) -> Budget:
    """The rank budget that the options describe."""
    return Budget(config.rank, config.alpha, config.max_rank)


def calibration_batches(config: PlanConfig, train: Split) -> list[Batch]:
    """The calibration samples in batches; under ``mlx.launch``, this process's share."""
    samples = draw_samples(train.samples, config.calibration_samples, config.seed)
    batches = batches_in_order(samples, config.batch_size, config.max_seq_length)
    return [batch for batch in batches if batch]


def plan_from_first(mine: RankPlan | None) -> RankPlan | None:
    """Send the first process's plan to all under ``mlx.launch``; the others' is ignored."""
    data = from_first(mine and mine.to_dict())
    return data and RankPlan.from_dict(data)


def check_plan(path: str) -> None:
    """Refuse, before the model is loaded, a file that holds no plan at all.

    A plan's modules are checked with the model, so that all faults are in one message.

    Raises:
        UserError: it is not JSON, or has no modules.
    """
    data = read_json(user_path(path), "the rank plan")
    if not isinstance(data, dict) or not isinstance(data.get("modules"), dict):
        raise _invalid(path, RankPlan.faults(data))


def read_plan(path: str, targets: Mapping[str, Linear] | None = None) -> RankPlan:
    """Read a plan and, where targets are given, check it against them.

    Raises:
        UserError: it is not a plan, or does not fit the model; all faults in one message.
    """
    data = read_json(user_path(path), "the rank plan")
    faults = RankPlan.faults(data)
    modules = data.get("modules") if isinstance(data, dict) else None
    if isinstance(modules, dict) and targets is not None:
        faults += _misfits(modules, targets)
    if faults:
        raise _invalid(path, faults)
    plan = RankPlan.from_dict(data)
    idle = [
        f"{name} has rank {module.rank} and scale 0, so it would learn nothing; set its rank to 0 "
        "to leave it out"
        for name, module in plan.adapted().items()
        if not module.scale
    ]
    if idle or not plan.adapted():
        raise _invalid(path, idle or ["no module has a rank above 0"])
    return plan


def _invalid(path: str, faults: Sequence[str]) -> UserError:
    return UserError(f"the rank plan {path} is invalid: {'; '.join(faults)}")


def _misfits(modules: Mapping[str, Any], targets: Mapping[str, nn.Module]) -> Iterator[str]:
    """The differences between a plan's modules, as in its JSON, and these targets."""
    for name, module in modules.items():
        if name not in targets:
            yield f"{name} is not a target module of the model"
        elif isinstance(module, dict):
            shape = linear_shape(targets[name])
            rank, *found = (module.get(key) for key in ("rank", "out_features", "in_features"))
            if None not in found and tuple(found) != shape:
                yield f"{name} has shape {shape} in the model, but {tuple(found)} in the plan"
            elif type(rank) is int and rank > min(shape):
                yield f"{name} has rank {rank}, above min{shape}"


def plan_and_initialise(
    config: TrainConfig, setup: Setup, observer: Observer = SILENT
) -> Initialisation:
    """The rank plan, and A of every adapted module.

    Raises:
        UserError: the given plan does not fit, or a module cannot be calibrated.
        RunError: a statistic is not finite.
    """
    given, targets = None, setup.targets
    if config.plan:  # only the first process reads the file; the others need not have it
        given = plan_from_first(read_plan(config.plan, targets) if is_first() else None)
        targets = {name: targets[name] for name in targets if name in given.modules}
        if unused := _without_effect(config, given):
            observer.note(f"warning: {unused} no effect: ranks and scales are those of --plan")
    start, model_memory = time.perf_counter(), mx.get_active_memory()
    mx.reset_peak_memory()
    with _failures():
        found = initialise(
            setup.base.model,
            targets,
            calibration_batches(config, setup.data["train"]),
            budget(config),
            plan=given,
            covariance=config.covariance,
            memory=min(from_each(allowed_memory(config))),
            seed=config.seed,
            observer=observer,
        )
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory() - model_memory
    observer.note(f"initialised in {seconds:.1f} s, peak memory {decimal(peak)} above the model")
    end_stage()
    return found


def _without_effect(config: TrainConfig, given: RankPlan) -> str:
    """The options about ranks that say something else than the given plan, with their verb."""
    asked = {"--rank": config.rank != TrainConfig.rank and config.rank != given.rank}
    asked["--alpha"] = config.alpha not in (config.rank, given.alpha)
    asked["--max-rank"] = config.max_rank is not None
    names = [name for name, is_asked in asked.items() if is_asked]
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'}" if names else ""


@contextmanager
def _failures() -> Iterator[None]:
    """Within the block, turn the method's exceptions into the two that commands report."""
    try:
        yield
    except NotImplementedError as error:
        raise UserError(f"{error}; exclude it with --target-modules") from None
    except ValueError as error:
        raise RunError(str(error)) from None


def allowed_memory(config: TrainConfig) -> int:
    """Bytes that covariances may take: as given, or a quarter of what the machine offers."""
    if config.calibration_memory:
        return int(config.calibration_memory * 1e9)
    return machine_memory() // 4
