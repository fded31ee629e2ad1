"""The steps that ``train`` and ``plan`` share: load, calibrate, allocate, initialise."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tlora_mlx.base_model import BaseModel, load_base_model
from tlora_mlx.config import PlanConfig, TrainConfig
from tlora_mlx.errors import RunError, UserError
from tlora_mlx.exporting.names import unexportable
from tlora_mlx.files import read_json, user_path
from tlora_mlx.importing.read import read_adapter, run_on, without_dead_ranks
from tlora_mlx.method.allocation import RankPlan, plan_ranks
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.calibration import Calibration, calibrate
from tlora_mlx.method.covariance import exact_bytes, groups_within, input_leaders
from tlora_mlx.method.distributed import (
    from_each,
    from_first,
    is_first,
    processes,
    tensors_from_first,
)
from tlora_mlx.method.experts import Expert
from tlora_mlx.method.initialise import (
    exact_subspaces,
    grouped_subspaces,
    streamed_bytes,
    streamed_subspaces,
)
from tlora_mlx.method.layers import Linear, linear_shape, target_linears
from tlora_mlx.terminal import bar, say
from tlora_mlx.training.data import Sample, Split, batches_in_order, load_data, split_off
from tlora_mlx.training.progress import print_plan


def load(config: PlanConfig) -> tuple[BaseModel, dict[str, Split], dict[str, Linear]]:
    """The base model, the data's splits, and the target modules by full name.

    Raises:
        UserError: any of them is not as the configuration says.
    """
    if limit := mx.device_info().get("max_recommended_working_set_size"):
        mx.set_wired_limit(limit)  # keeps large models resident on Metal, as mlx-lm does
    base = load_base_model(config.model, config.trust_remote_code)
    blocks = len(base.model.layers)
    if config.num_layers > blocks:
        raise UserError(f"--num-layers {config.num_layers}: the model has only {blocks} blocks")
    try:
        targets = target_linears(
            base.model, config.num_layers, config.target_modules, config.target_experts
        )
    except ValueError as error:
        raise UserError(f"--target-modules, --target-experts: {error}") from None
    if reason := unexportable(base.config["model_type"], targets):
        if not config.allow_unexportable:
            raise UserError(f"{reason}; train all the same with --allow-unexportable")
        say(f"warning: {reason}; it trains, but tlora_mlx.export will refuse it")
    data = load_data(
        config.data,
        base.tokenizer,
        config.max_seq_length,
        config.mask_prompt,
        config.format,
        config.max_samples,
    )
    if config.val_split:
        if data["valid"].samples:
            raise UserError(f"--val-split: {config.data} has a validation split already")
        data["train"], data["valid"] = split_off(data["train"], config.val_split, config.seed)
    for name, split in data.items():
        _say_split(name, split, config.max_seq_length)
    if processes() > 1:
        _compare_processes(config, base, data)
    if config.grad_checkpoint:
        _enable_grad_checkpoint(base.model)
    return base, data, targets


def fingerprints(base: BaseModel, data: Mapping[str, Split]) -> dict[str, str]:
    """What a resumed run must find again: digests of the model and of the tokenized samples."""
    return {"model": base.fingerprint()} | {
        f"{name} data": _digest([sample[:2] for sample in data[name].samples])
        for name in ("train", "valid")
    }


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _compare_processes(config: PlanConfig, base: BaseModel, data: Mapping[str, Split]) -> None:
    """See that all processes have the same model, data and options, wherever these lie."""
    options = {k: v for k, v in config.to_dict().items() if k not in ("model", "data")}
    mine = {**fingerprints(base, data), "test data": _digest([s[:2] for s in data["test"].samples])}
    mine |= {f"option --{k.replace('_', '-')}": v for k, v in options.items()}
    first = from_first(mine)
    faults = from_each([name for name in mine if mine[name] != first[name]])
    for number, names in enumerate(faults):
        if names:
            raise UserError(
                f"process {number} has another {' and another '.join(names)} than the first; all "
                "need the same model, data and options"
            )
    if config.batch_size < processes():
        say(
            f"warning: --batch-size {config.batch_size} is shared out to {processes()} processes, "
            "so some have nothing to do"
        )


def _say_split(name: str, split: Split, max_seq_length: int) -> None:
    text = f"{name}: {len(split)} samples"
    if split.truncated:
        text += f", {split.truncated} of them cut to {max_seq_length} tokens"
    if split.left_out:
        text += f"; {split.left_out} rows left out, since no token of theirs counts in the loss"
    if split.samples or split.left_out:
        say(text)


def _enable_grad_checkpoint(model: nn.Module) -> None:
    """Recompute each block's activations in the backward pass (mlx-lm's own way)."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    for block in {type(block): block for block in model.layers}.values():
        grad_checkpoint(block)


def calibration_batches(config: PlanConfig, train: Split) -> list[Batch]:
    """The calibration samples in batches: under ``mlx.launch``, this process's share of them."""
    samples = calibration_samples(train.samples, config.calibration_samples, config.seed)
    batches = batches_in_order(samples, config.batch_size, config.max_seq_length)
    return [batch for batch in batches if batch]


def calibration_samples(samples: list[Sample], number: int, seed: int) -> list[Sample]:
    """So many samples drawn at random without replacement; all of them if there are fewer."""
    if len(samples) <= number:
        return samples
    chosen = np.random.default_rng(seed).choice(len(samples), number, replace=False)
    return [samples[i] for i in sorted(chosen.tolist())]


def _count(batches: list[Batch]) -> int:
    return sum(batch.tokens.shape[0] for batch in batches)


def calibrate_and_plan(
    config: PlanConfig,
    base: BaseModel,
    targets: Mapping[str, Linear],
    batches: list[Batch],
    covariance_of: Collection[str] = (),
) -> tuple[Calibration, RankPlan]:
    """Run the calibration samples through the model and allocate ranks and scales.

    Raises:
        UserError: a target module does not see its inputs sample by sample.
        RunError: the base model's loss or gradients are not finite on a sample.
    """
    try:
        with bar("calibrating", _count(batches)) as advance:
            calibration = calibrate(base.model, targets, batches, covariance_of, advance)
        shapes = {name: linear_shape(module) for name, module in targets.items()}
        plan = plan_ranks(
            calibration.sensitivities, shapes, config.rank, config.alpha, config.max_rank
        )
    except NotImplementedError as error:
        raise UserError(f"{error}; leave it out with --target-modules") from None
    except ValueError as error:
        raise RunError(f"the calibration failed: {error}") from None
    return calibration, plan


def read_plan(path: str, targets: Mapping[str, Linear] | None = None) -> RankPlan:
    """Read a plan and, where targets are given, check it against them.

    Raises:
        UserError: it is no plan, or does not fit the model; all faults in one message.
    """
    data = read_json(user_path(path), "the rank plan")
    faults = RankPlan.faults(data)
    modules = data.get("modules") if isinstance(data, dict) else None
    if isinstance(modules, dict) and targets is not None:
        faults += _misfits(modules, targets)
    if not faults and not RankPlan.from_dict(data).adapted():
        faults = ["no module has a rank above 0"]
    if faults:
        raise UserError(f"the rank plan {path} is not right: {'; '.join(faults)}")
    return RankPlan.from_dict(data)


def _misfits(modules: Mapping[str, Any], targets: Mapping[str, nn.Module]) -> Iterator[str]:
    """What keeps a plan's modules, as its JSON has them, from being these targets."""
    for name, module in modules.items():
        if name not in targets:
            yield f"{name} is no target module of the model"
        elif isinstance(module, dict):
            shape = linear_shape(targets[name])
            rank, *found = (module.get(key) for key in ("rank", "out_features", "in_features"))
            if None not in found and tuple(found) != shape:
                yield f"{name} has shape {shape} in the model, {tuple(found)} in the plan"
            elif type(rank) is int and rank > min(shape):
                yield f"{name} has rank {rank}, above min{shape}"


def plan_and_initialise(
    config: TrainConfig,
    base: BaseModel,
    train: Split,
    targets: Mapping[str, Linear],
    energies: dict[str, float] | None = None,
) -> tuple[RankPlan, dict[str, mx.array]]:
    """The rank plan, and ``NAME.lora_a`` (in, rank) for every adapted module.

    ``energies``, where given, is filled with the captured energies of modules; not with streaming.

    Raises:
        UserError: the plan that was given does not fit, or a module cannot be calibrated.
        RunError: a statistic is not finite.
    """
    given = None
    if config.plan:  # the first process's file counts; the others need not have it
        given = read_plan(config.plan, targets) if is_first() else None
        given = RankPlan.from_dict(from_first(given and given.to_dict()))
    if given:
        targets = {name: targets[name] for name in targets if name in given.modules}
    start, model_memory = time.perf_counter(), mx.get_active_memory()
    mx.reset_peak_memory()
    batches = calibration_batches(config, train)
    leaders = input_leaders(base.model, targets)
    memory = min(from_each(int((config.calibration_memory or default_memory()) * 1e9)))
    groups = groups_within(targets, leaders.values(), memory)
    streaming = config.covariance == "streaming" or (
        config.covariance == "auto" and len(groups) > 1
    )
    if given:
        calibration, plan = Calibration({}, {}, 0), given
    else:
        # Experts' covariances take passes of their own: which rows are whose is known there.
        wanted = () if streaming else [n for n in groups[0] if not isinstance(targets[n], Expert)]
        calibration, plan = calibrate_and_plan(config, base, targets, batches, wanted)
    print_plan(plan)
    if streaming:
        expected, how = streamed_bytes(plan), "streaming"
    else:
        expected = max(exact_bytes(targets, group) for group in groups)
        how = f"exact, {len(groups)} pass{'es' * (len(groups) > 1)}"
    say(f"covariance: {how}, about {_size(expected)} ({_size(memory)} allowed)")
    try:
        subspaces = exact_subspaces(
            plan, targets, leaders, calibration.covariances, energies=energies
        )
        calibration.covariances.clear()
        left = {n: m for n, m in plan.modules.items() if m.rank and n not in subspaces}
        rest = replace(plan, modules=left)
        with bar("task subspaces", 0) as advance:
            common = (base.model, rest, targets, leaders, batches)
            if streaming:
                subspaces |= streamed_subspaces(*common, config.seed, advance)
            elif left:
                subspaces |= grouped_subspaces(*common, memory, advance, energies)
    except ValueError as error:
        raise RunError(f"the task subspace failed: {error}") from None
    tensors = tensors_from_first({f"{name}.lora_a": a.T for name, a in subspaces.items()})
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory() - model_memory
    say(f"initialised in {seconds:.1f} s, peak memory {_size(peak)} above the model")
    mx.reset_peak_memory()
    return plan, tensors


def from_adapter(path: str, base: BaseModel) -> tuple[RankPlan, dict[str, mx.array]]:
    """The plan of an adapter, and its ``NAME.lora_a`` and ``NAME.lora_b``, to go on from.

    Raises:
        UserError: it cannot be read, or does not fit the model; all faults in one message.
    """
    adapter = read_adapter(path)
    if adapter.base and adapter.base not in (base.name, base.original):
        say(f"warning: {path} was made for {adapter.base}, and --model is {base.name}")
    run = run_on(adapter, base.model, base.name, base.original, base.config["model_type"])
    run = without_dead_ranks(run)
    print_plan(run.plan)
    return run.plan, run.tensors


def default_memory() -> float:
    """GB: a quarter of what Metal recommends for the GPU; elsewhere, of the machine's memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    total = recommended or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total / 4e9


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
