"""A base model with an adapter attached, ready to generate or evaluate."""

from __future__ import annotations

from pathlib import Path

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.errors import UserError
from tlora_mlx.method.layers import attach
from tlora_mlx.models.base_model import BaseModel, load_base_model


def load_adapter(
    adapter: Adapter | str | Path,
    *,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> BaseModel:
    """Load an adapter's base model with the adapter attached.

    Args:
        adapter: a run, a PEFT LoRA adapter or an mlx-lm adapter, or its directory. It is loaded on
            the base model that it names.
        base_model: the directory or Hub repository of its base model, instead of the one that it
            names, which may have been on another machine.
        trust_remote_code: allow code from the model's repository to run.

    Returns:
        The base model in evaluation mode; its adapted layers are ``TLoRALinear``, or
        ``TLoRASwitchLinear`` for experts.

    Raises:
        UserError: the adapter or its base model cannot be loaded, or they do not fit together.
    """
    adapter = resolve_adapter(adapter, base_model)
    try:
        base = load_base_model(base_model or adapter.model, trust_remote_code)
    except UserError as error:
        if base_model is not None:
            raise
        raise UserError(f"the base model of {adapter.label}: {error}; see --base-model") from None
    try:
        attach(base.model, adapter.plan, adapter.tensors)
    except ValueError as error:
        raise UserError(f"run {adapter.label} does not fit model {base.name}: {error}") from None
    base.model.eval()
    return base
