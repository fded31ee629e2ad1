"""The steps that ``train`` and ``plan`` share: load, calibrate, allocate, initialise."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tlora_mlx.base_model import BaseModel, load_base_model
from tlora_mlx.config import PlanConfig
from tlora_mlx.errors import RunError, UserError
from tlora_mlx.exporting.names import unexportable
from tlora_mlx.method.allocation import RankPlan, plan_ranks
from tlora_mlx.method.calibration import Calibration, calibrate
from tlora_mlx.method.layers import dense_weight, linear_shape, target_linears
from tlora_mlx.method.subspace import task_subspace
from tlora_mlx.training.data import Sample, Split, batches_in_order, load_data
from tlora_mlx.training.progress import bar, say


def load(config: PlanConfig) -> tuple[BaseModel, dict[str, Split], dict[str, nn.Module]]:
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
        targets = target_linears(base.model, config.num_layers, config.target_modules)
    except ValueError as error:
        raise UserError(f"--target-modules: {error}") from None
    if reason := unexportable(base.config["model_type"], targets):
        say(f"warning: {reason}; it trains, but tlora_mlx.export will refuse it")
    data = load_data(config.data, base.tokenizer, config.max_seq_length, config.mask_prompt)
    for name, split in data.items():
        _say_split(name, split, config.max_seq_length)
    return base, data, targets


def _say_split(name: str, split: Split, max_seq_length: int) -> None:
    text = f"{name}: {len(split)} samples"
    if split.truncated:
        text += f", {split.truncated} of them cut to {max_seq_length} tokens"
    if split.left_out:
        text += f"; {split.left_out} rows left out, since no token of theirs counts in the loss"
    if split.samples or split.left_out:
        say(text)


def calibrate_and_plan(
    config: PlanConfig, base: BaseModel, train: Split, targets: Mapping[str, nn.Module]
) -> tuple[Calibration, RankPlan]:
    """Run the calibration samples through the model and allocate ranks and scales.

    Raises:
        UserError: a target module does not see its inputs sample by sample.
        RunError: the base model's loss or gradients are not finite on a sample.
    """
    samples = calibration_samples(train.samples, config.calibration_samples, config.seed)
    try:
        with bar("calibrating", len(samples)) as advance:
            batches = batches_in_order(samples, config.batch_size, config.max_seq_length)
            calibration = calibrate(base.model, targets, batches, on_batch=advance)
        shapes = {name: linear_shape(module) for name, module in targets.items()}
        plan = plan_ranks(
            calibration.sensitivities, shapes, config.rank, config.alpha, config.max_rank
        )
    except NotImplementedError as error:
        raise UserError(f"{error}; leave it out with --target-modules") from None
    except ValueError as error:
        raise RunError(f"the calibration failed: {error}") from None
    return calibration, plan


def calibration_samples(samples: list[Sample], number: int, seed: int) -> list[Sample]:
    """So many samples drawn at random without replacement; all of them if there are fewer."""
    if len(samples) <= number:
        return samples
    chosen = np.random.default_rng(seed).choice(len(samples), number, replace=False)
    return [samples[i] for i in sorted(chosen.tolist())]


def initialise(
    plan: RankPlan, targets: Mapping[str, nn.Module], calibration: Calibration
) -> dict[str, mx.array]:
    """``NAME.lora_a`` (in, rank) for every adapted module: its task subspace.

    Raises:
        RunError: W·C of a module is not finite.
    """
    adapted = plan.adapted()
    tensors = {}
    with bar("task subspaces", len(adapted)) as advance:
        for name, module in adapted.items():
            weight = dense_weight(targets[name])
            try:
                a = task_subspace(weight, calibration.covariances[name], module.rank)
            except ValueError as error:
                raise RunError(f"the task subspace of {name} failed: {error}") from None
            tensors[f"{name}.lora_a"] = a.T
            advance()
    return tensors
