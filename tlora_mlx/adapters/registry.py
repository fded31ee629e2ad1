"""Any adapter directory: find its format, read it, and bind it to its base model."""

from __future__ import annotations

from pathlib import Path

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.binding import check_fit, take_over
from tlora_mlx.adapters.format import CONFIG
from tlora_mlx.adapters.mlx_lm import MLX_LM
from tlora_mlx.adapters.peft import PEFT
from tlora_mlx.adapters.run import RUN
from tlora_mlx.errors import UserError
from tlora_mlx.models.base_model import Description, describe_base_model
from tlora_mlx.storage.files import read_json, user_path
from tlora_mlx.storage.foreign import file_in

# The first format that recognises a directory reads it.
FORMATS = {format.name: format for format in (PEFT, RUN, MLX_LM)}


def read_adapter(path: str | Path) -> Adapter:
    """Read a run, a PEFT LoRA adapter or an mlx-lm adapter, without its base model.

    Args:
        path: the adapter's directory; or one of an mlx-lm adapter's ``.safetensors`` files, which
            mlx-lm's trainer writes at several steps.

    Returns:
        The adapter with its own tool's module names; A and B are oriented as in MLX, in the dtype
        of the file.

    Raises:
        UserError: it is none of them, incomplete, or more than LoRA on linear layers.
    """
    path = user_path(path)
    if path.is_file() and path.suffix == ".safetensors":
        config = read_json(path.parent / CONFIG, "the adapter's configuration")
        if isinstance(config, dict) and not PEFT.recognises(config) and MLX_LM.recognises(config):
            return MLX_LM.read(path.parent, config, path.name)
        raise UserError(f"{path} is not a file of an mlx-lm adapter; give its directory")
    if not path.is_dir():
        raise UserError(f"adapter directory {path} does not exist")
    config = read_json(file_in(path, CONFIG), "the adapter's configuration")
    config = config if isinstance(config, dict) else {}
    for format in FORMATS.values():
        if format.recognises(config):
            return format.read(path, config)
    raise UserError(
        f"{path} is not a run, PEFT adapter or mlx-lm adapter: {CONFIG} has no 'peft_type', "
        "'lora_parameters' or 'fine_tune_type'"
    )


def bind_to_model(adapter: Adapter, base: Description) -> Adapter:
    """Bind an adapter to a model, with MLX's module names.

    Args:
        adapter: from ``read_adapter``.
        base: the model, with or without its weights.

    Raises:
        UserError: its family differs, the MLX name of a module is unknown, or it does not fit the
            model; all faults in one message.
    """
    if adapter.model_type is None:
        parts = FORMATS[adapter.source].mlx_parts(adapter, base.model_type)
        return take_over(adapter, base, parts)
    check_fit(adapter, base)
    return adapter


def resolve_adapter(adapter: Adapter | str | Path, base_model: str | None = None) -> Adapter:
    """Read an adapter if necessary, and give its modules MLX's names.

    Args:
        adapter: an adapter, or the directory of a run, a PEFT LoRA adapter or an mlx-lm adapter.
        base_model: for another tool's adapter: the model to load it on, a directory or Hub
            repository, instead of the one that it names. Only its ``config.json`` is read. A run
            keeps its own.

    Returns:
        The adapter with its base model's name; A and B are in the dtype of the file.

    Raises:
        UserError: it cannot be read, its base model is not found, or a module's name is unknown.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    if adapter.model_type is not None:
        return adapter
    wanted = base_model or adapter.base
    if wanted is None:
        raise UserError(
            f"the adapter {adapter.label} names no base model; name it with --base-model"
        )
    try:
        base = describe_base_model(wanted)
    except UserError as error:
        raise UserError(
            f"the base model of adapter {adapter.label}: {error}; see --base-model"
        ) from None
    return bind_to_model(adapter, base)
