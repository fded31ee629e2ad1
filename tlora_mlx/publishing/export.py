"""Exporting, from the options to the result: read or combine, write, prove, add a model card."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.gguf import ADAPTER, write_gguf_adapter
from tlora_mlx.adapters.mlx_lm import MLX_LM
from tlora_mlx.adapters.peft import PEFT
from tlora_mlx.adapters.proof import Proof
from tlora_mlx.adapters.run import RUN
from tlora_mlx.adapters.source import read_source
from tlora_mlx.config.export_options import ExportCommand
from tlora_mlx.errors import UserError
from tlora_mlx.invocation import suggested
from tlora_mlx.merging.bits import affine_weights
from tlora_mlx.merging.conversion import read_conversion
from tlora_mlx.merging.dense import export_merged
from tlora_mlx.merging.dequantize import export_dequantized
from tlora_mlx.merging.gguf_model import MODEL, export_gguf
from tlora_mlx.merging.requantize import export_requantized
from tlora_mlx.models.compatibility import mlx_lm_warning
from tlora_mlx.models.model_directory import read_model_config
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.publishing.card import write_card
from tlora_mlx.publishing.hub import check_base, check_push, check_rights
from tlora_mlx.publishing.instructions import EXPORTS
from tlora_mlx.publishing.modelfile import MODELFILE, write_modelfile
from tlora_mlx.storage.files import Finish, user_path

if TYPE_CHECKING:  # it loads mlx-lm, which the other exports do without
    from tlora_mlx.merging.task import AdaptedTask


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        directory: the new directory.
        proof: what reading it back has shown.
        how_to_load: two or three lines for the user.
    """

    directory: Path
    proof: Proof
    how_to_load: str


def export(config: ExportCommand, observer: Observer = SILENT) -> ExportResult:
    """Export as configured, without pushing.

    Args:
        config: the options of ``tlora export``.
        observer: notified of the progress.

    Returns:
        The directory, the result of reading it back, and how to load it.

    Raises:
        UserError: the adapter, the options or the output directory are invalid, or it could not be
            pushed to ``config.push_to``.
        RunError: writing failed, or what was read back differs.
    """
    target = _TARGETS[config.kind]
    adapter = read_source(config, config.base_model, observer)
    if config.push_to is not None:
        _check_push(config, adapter)
    output = user_path(config.output or f"{adapter.directory}-{config.format}")
    name = config.push_to or output.resolve().name

    def finish(staging: Path) -> None:
        if config.kind in EXPORTS:
            write_card(staging, adapter, config.kind, config.base_model, name)

    proof = target.write(adapter, output, config, observer, finish)
    return ExportResult(output, proof, target.how_to_load(output, config))


def _check_push(config: ExportCommand, adapter: Adapter) -> None:
    """Check that a push is possible, before the work starts."""
    check_push(config.push_to)
    base = config.base_model or adapter.original
    if base and EXPORTS[config.kind].names_base:
        check_base(base)
    check_rights(config.push_to, config.private)


def _write_peft(
    adapter: Adapter, output: Path, config: ExportCommand, _: Observer, finish: Finish
) -> Proof:
    options = config.dtype, config.base_model, config.layout, config.names
    return PEFT.write(adapter, output, *options, finish=finish)


def _how_to_load_peft(output: Path, config: ExportCommand) -> str:
    return (
        f"{config.layout} PEFT adapter in {output}; load it with\n"
        f"  PeftModel.from_pretrained(base_model, {str(output)!r})"
    )


def _write_mlx_lm(
    adapter: Adapter, output: Path, config: ExportCommand, observer: Observer, finish: Finish
) -> Proof:
    name = config.base_model or adapter.model
    if Path(name).is_dir() and (
        warning := mlx_lm_warning(name, read_model_config(Path(name), name))
    ):
        observer.note(warning)
    return MLX_LM.write(adapter, output, config.dtype, config.base_model, finish=finish)


def _how_to_load_mlx_lm(output: Path, _: ExportCommand) -> str:
    return (
        f"mlx-lm adapter in {output}; try it with\n"
        f"  mlx_lm.generate --model … --adapter-path {str(output)!r} --prompt …"
    )


def _write_merged(
    adapter: Adapter, output: Path, config: ExportCommand, observer: Observer, finish: Finish
) -> Proof:
    if config.dequantize:
        return export_dequantized(adapter, output, observer=observer, finish=finish)
    if config.quantize:
        task = _task(adapter, config, observer)
        return export_requantized(
            adapter,
            output,
            task=task,
            auto_bits=config.bits is not None,
            target_bpw=config.target_bpw,
            observer=observer,
            finish=finish,
        )
    return export_merged(
        adapter, output, base_model=config.base_model, observer=observer, finish=finish
    )


def _task(adapter: Adapter, config: ExportCommand, observer: Observer) -> AdaptedTask | None:
    """The task that ``--quantize`` rounds by; None: to nearest."""
    from tlora_mlx.merging.task import read_task

    if config.rounding == "nearest":
        return None
    base, _ = read_conversion(adapter, "--quantize")  # before a model is loaded
    if config.bits:
        affine_weights(base)
    task = read_task(adapter, config.data, observer)
    if task is None and (config.rounding or config.bits):
        option = f"--rounding {config.rounding}" if config.rounding else f"--bits {config.bits}"
        raise UserError(
            f"{option} needs the task's data, and {adapter.label} names none; name them with --data"
        )
    if task is None:
        observer.note(
            f"{adapter.label} names no data, so weights are rounded to nearest, which loses small "
            "changes; --data names data to round by"
        )
    return task


def _how_to_load_merged(output: Path, config: ExportCommand) -> str:
    loader = "mlx_lm.load" if config.quantize else "AutoModelForCausalLM.from_pretrained"
    return f"merged model in {output}; load it with\n  {loader}({str(output)!r})"


def _write_gguf(
    adapter: Adapter, output: Path, config: ExportCommand, _: Observer, finish: Finish
) -> Proof:
    return write_gguf_adapter(adapter, output, config.dtype, config.base_model, finish=finish)


def _how_to_load_gguf(output: Path, _: ExportCommand) -> str:
    argument = shlex.quote(str(output / ADAPTER))
    return f"GGUF adapter in {output}; load it with\n  llama-cli -m base.gguf --lora {argument}"


def _write_gguf_model(
    adapter: Adapter, output: Path, config: ExportCommand, observer: Observer, finish: Finish
) -> Proof:
    base_model = config.base_model or adapter.original

    def finish_with_modelfile(staging: Path) -> None:
        write_modelfile(staging, base_model)
        finish(staging)

    return export_gguf(
        adapter,
        output,
        outtype=config.outtype,
        base_model=base_model,
        observer=observer,
        finish=finish_with_modelfile,
    )


def _how_to_load_gguf_model(output: Path, _: ExportCommand) -> str:
    model, modelfile = (shlex.quote(str(output / name)) for name in (MODEL, MODELFILE))
    return (
        f"GGUF model in {output}; chat with it in llama.cpp, or add it to Ollama:\n"
        f"  llama-cli -m {model}\n"
        f"  ollama create NAME -f {modelfile}"
    )


def _write_run(
    adapter: Adapter, output: Path, config: ExportCommand, _: Observer, finish: Finish
) -> Proof:
    # --base-model is ignored here: a run keeps the base model that it was read or combined with.
    return RUN.write(adapter, output, config.dtype, finish=finish)


def _how_to_load_run(output: Path, _: ExportCommand) -> str:
    command = suggested("generate", output, "--prompt", "TEXT")
    return f"run directory in {output}; try it with\n  {command}"


@dataclass(frozen=True)
class _Target:
    """What ``--format`` chooses.

    Attributes:
        write: writes the adapter into a new directory, reads it back and has it finished.
        how_to_load: two or three lines for the user.
    """

    write: Callable[[Adapter, Path, ExportCommand, Observer, Finish], Proof]
    how_to_load: Callable[[Path, ExportCommand], str]


_TARGETS = {
    "peft": _Target(_write_peft, _how_to_load_peft),
    "mlx-lm": _Target(_write_mlx_lm, _how_to_load_mlx_lm),
    "merged": _Target(_write_merged, _how_to_load_merged),
    "gguf": _Target(_write_gguf, _how_to_load_gguf),
    "gguf-merged": _Target(_write_gguf_model, _how_to_load_gguf_model),
    "run": _Target(_write_run, _how_to_load_run),
}
