"""Any adapter directory, whoever made it, as what it is and as a run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.base_model import describe_base_model
from tlora_mlx.errors import UserError
from tlora_mlx.exporting.names import mlx_name
from tlora_mlx.files import read_json, user_path
from tlora_mlx.importing.adapter import Adapter
from tlora_mlx.importing.mlx_lm import read_mlx_lm
from tlora_mlx.importing.peft import read_peft
from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.method.layers import (
    adapter_faults,
    linear_shape,
    linear_shapes,
    target_linears,
)
from tlora_mlx.run_directory import CONFIG, Run, read_run


def read_adapter(path: str | Path) -> Adapter:
    """Read a run, a PEFT LoRA adapter or an mlx-lm adapter, without its base model.

    Args:
        path: the adapter's directory.

    Returns:
        The adapter under its own tool's module names; A and B are oriented as MLX keeps them, in
        the dtype of the file.

    Raises:
        UserError: it is none of them, or not whole, or more than LoRA on linear layers.
    """
    path = user_path(path)
    if not path.is_dir():
        raise UserError(f"adapter directory {path} does not exist")
    config = read_json(path / CONFIG, "the adapter's configuration")
    keys = config.keys() if isinstance(config, dict) else ()
    if "peft_type" in keys:
        return read_peft(path, config)
    if "fine_tune_type" in keys and config["fine_tune_type"] == "tlora":
        run = read_run(path)
        base = run.config.get("base_model") or run.config["model"]
        return Adapter(path, "tlora", run.config, base, run.plan, run.tensors)
    if "lora_parameters" in keys or "fine_tune_type" in keys:
        return read_mlx_lm(path, config)
    raise UserError(
        f"{path} is no run, PEFT adapter or mlx-lm adapter: {CONFIG} has no 'peft_type', "
        "'lora_parameters' or 'fine_tune_type'"
    )


def read_as_run(path: str | Path, base_model: str | None = None) -> Run:
    """Read any adapter directory as a run: under MLX's module names, with its base model's name.

    Args:
        path: a run, a PEFT LoRA adapter or an mlx-lm adapter.
        base_model: for another tool's adapter: the model that it is to be loaded on, as a
            directory or Hub repository, instead of the one that it names. Of it only
            ``config.json`` is read. A run keeps its own.

    Returns:
        The run, with A and B in the dtype of the file.

    Raises:
        UserError: it cannot be read, its base model is not found, or a module has no known name.
    """
    adapter = read_adapter(path)
    if adapter.format == "tlora":
        return Run(adapter.path, adapter.config, adapter.plan, adapter.tensors)
    wanted = base_model or adapter.base
    if wanted is None:
        raise UserError(f"the adapter {path} names no base model; name it with --base-model")
    try:
        base = describe_base_model(wanted)
    except UserError as error:
        raise UserError(f"the base model of adapter {path}: {error}; see --base-model") from None
    return run_on(adapter, base.model, base.name, base.original, base.model_type)


def run_on(
    adapter: Adapter, model: nn.Module, name: str, original: str | None, model_type: str
) -> Run:
    """An adapter as a run on a model.

    Args:
        adapter: what ``read_adapter`` read.
        model: the model, with or without its weights.
        name: its directory or Hub repository.
        original: the full-precision model behind it, if it is known.
        model_type: its family.

    Raises:
        UserError: it is a run of another family, the MLX name of a module is not known, or the
            adapter does not fit the model; all faults in one message.
    """
    plan, tensors, config = adapter.plan, adapter.tensors, adapter.config
    if adapter.format == "tlora" and (own := config["model_type"]) != model_type:
        raise UserError(
            f"the run {adapter.path} is of family '{own}', and {name} of family '{model_type}'"
        )
    if adapter.format == "peft":
        names = {theirs: mlx_name(model_type, theirs) for theirs in plan.modules}
        if unknown := [theirs for theirs, known in names.items() if known is None]:
            raise UserError(
                f"the adapter {adapter.path} cannot be taken over: the MLX names of these modules "
                f"of family '{model_type}' are not known: {', '.join(unknown)}"
            )
        plan = replace(plan, modules={names[n]: module for n, module in plan.modules.items()})
        tensors = {
            f"{names[theirs]}.{key}": tensors[f"{theirs}.{key}"]
            for theirs in names
            for key in ("lora_a", "lora_b")
        }
        original = original or adapter.base
    if faults := adapter_faults(plan, tensors, linear_shapes(model)):
        raise UserError(
            f"the adapter {adapter.path} does not fit model {name}: {'; '.join(faults)}"
        )
    if adapter.format != "tlora":
        plan = with_gaps(plan, model)
        config = {
            "fine_tune_type": "tlora",
            "model": name,
            "base_model": original,
            "model_type": model_type,
            "made_from": {"path": str(adapter.path.resolve()), "format": adapter.format},
        }
    return Run(adapter.path, config, plan, tensors)


def without_dead_ranks(run: Run) -> Run:
    """The run without the ranks whose row of A is all zeros, such as a portable export's padding.

    They do nothing, and with A frozen never could.

    Raises:
        UserError: nothing is left.
    """
    modules, tensors = dict(run.plan.modules), {}
    for name, module in run.plan.adapted().items():
        a, b = run.tensors[f"{name}.lora_a"], run.tensors[f"{name}.lora_b"]
        alive = [i for i, any_entry in enumerate((a != 0).any(axis=0).tolist()) if any_entry]
        if len(alive) < module.rank:
            modules[name] = replace(module, rank=len(alive))
            a, b = a[:, mx.array(alive, mx.int32)], b[mx.array(alive, mx.int32)]
        if alive:
            tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    if not tensors:
        raise UserError(f"the adapter {run.path} does nothing: A is zero in all of its modules")
    return replace(run, plan=replace(run.plan, modules=modules), tensors=tensors)


def with_gaps(plan: RankPlan, model: nn.Module) -> RankPlan:
    """The plan with rank 0 for all that has an adapted module's last name, in the same blocks.

    A run's plan has these modules anyway; another tool's adapter says only what it adapts. Readers
    of an export need them: some drop a kind of module that is not in every block.
    """
    kinds = {name.rpartition(".")[2] for name in plan.modules}
    blocks = {_block(name) for name in plan.modules}
    modules = {}
    for name, linear in target_linears(model).items():
        if name in plan.modules:
            modules[name] = plan.modules[name]
        elif name.rpartition(".")[2] in kinds and _block(name) in blocks:
            modules[name] = ModulePlan(0, 1.0, 0.0, *linear_shape(linear))
    return replace(plan, modules=modules | plan.modules)


def _block(name: str) -> str:
    """Up to the first number: model.layers.3 of model.layers.3.self_attn.q_proj."""
    return re.match(r"(.*?\.\d+)?", name)[0]
