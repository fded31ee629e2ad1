"""Binding an adapter to a model: MLX's module names, and a check of the shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.errors import UserError
from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.method.layers import adapter_faults, linear_shape, linear_shapes, target_linears
from tlora_mlx.models.base_model import Description
from tlora_mlx.models.names import MLXPart


def check_fit(adapter: Adapter, base: Description) -> None:
    """Check that an adapter with MLX's module names belongs to this model.

    Raises:
        UserError: its family or its shapes differ; all faults in one message.
    """
    if adapter.model_type != base.model_type:
        raise UserError(
            f"the run {adapter.label} is of family '{adapter.model_type}', but {base.name} is of "
            f"family '{base.model_type}'"
        )
    if faults := adapter_faults(adapter.plan, adapter.tensors, linear_shapes(base.model)):
        raise UserError(
            f"the adapter {adapter.label} does not fit model {base.name}: {'; '.join(faults)}"
        )


def take_over(
    adapter: Adapter, base: Description, parts: Mapping[str, Sequence[MLXPart]]
) -> Adapter:
    """Rename the modules of another tool's adapter to MLX's names, and bind it to a model.

    Args:
        adapter: as read, with its own tool's names.
        base: the model, with or without its weights.
        parts: what each of its modules is in MLX; empty if unknown.

    Raises:
        UserError: a name is unknown, or the adapter does not fit the model; all faults in one
            message.
    """
    if unknown := [theirs for theirs, known in parts.items() if not known]:
        raise UserError(
            f"the adapter {adapter.label} cannot be used: the MLX names of these modules of "
            f"family '{base.model_type}' are not known: {', '.join(unknown)}"
        )
    modules, tensors = {}, {}
    for theirs, module in adapter.plan.modules.items():
        a, b = adapter.tensors[f"{theirs}.lora_a"], adapter.tensors[f"{theirs}.lora_b"]
        for name, rows in parts[theirs]:
            modules[name], pair = module, (a, b)
            if rows:
                pair = _pair_of_rows(a, b, rows.slice(module.out_features))
                rank, out_features = pair[1].shape
                modules[name] = replace(module, rank=rank, out_features=out_features)
            if modules[name].rank:
                tensors |= zip((f"{name}.lora_a", f"{name}.lora_b"), pair, strict=True)
    bound = replace(
        adapter,
        plan=replace(adapter.plan, modules=modules),
        tensors=tensors,
        config={"made_from": {"path": str(adapter.directory.resolve()), "format": adapter.source}},
        model=base.name,
        original=base.original or adapter.original,
        model_type=base.model_type,
    )
    check_fit(bound, base)
    return replace(bound, plan=add_rank_zero_modules(bound.plan, base.model))


def _pair_of_rows(a: mx.array, b: mx.array, rows: slice) -> tuple[mx.array, mx.array]:
    """A and B of some of a module's rows, without the ranks that other rows have for themselves."""
    ours, any_row = (b[:, rows] != 0).any(axis=1), (b != 0).any(axis=1)
    kept = [i for i, own in enumerate((ours | ~any_row).tolist()) if own]
    return a[:, mx.array(kept, mx.int32)], b[mx.array(kept, mx.int32)][:, rows]


def drop_zero_ranks(adapter: Adapter) -> Adapter:
    """The adapter without the ranks whose row of A is zeros, such as a portable export's padding.

    They have no effect, and with A frozen they never could.

    Raises:
        UserError: no rank is left.
    """
    modules, tensors = dict(adapter.plan.modules), {}
    for name, module in adapter.plan.adapted().items():
        a, b = adapter.tensors[f"{name}.lora_a"], adapter.tensors[f"{name}.lora_b"]
        alive = [i for i, any_entry in enumerate((a != 0).any(axis=0).tolist()) if any_entry]
        if len(alive) < module.rank:
            modules[name] = replace(module, rank=len(alive))
            a, b = a[:, mx.array(alive, mx.int32)], b[mx.array(alive, mx.int32)]
        if alive:
            tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    if not tensors:
        raise UserError(
            f"the adapter {adapter.label} has no effect: A is zero in all of its modules"
        )
    return replace(adapter, plan=replace(adapter.plan, modules=modules), tensors=tensors)


def add_rank_zero_modules(plan: RankPlan, model: nn.Module) -> RankPlan:
    """Add modules of rank 0 to a plan, so that every adapted block has every adapted kind.

    A kind is the last part of a module's name. A run's plan has these modules already; another
    tool's adapter lists only what it adapts. Readers of an export need them: some drop a kind of
    module that is missing from any block.
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
    """The name up to its first number: model.layers.3 of model.layers.3.self_attn.q_proj."""
    return re.match(r"(.*?\.\d+)?", name)[0]
