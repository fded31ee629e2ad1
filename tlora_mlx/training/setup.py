"""Preparing what training needs: the base model, its target modules, and the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from tlora_mlx.config.data_options import DataConfig
from tlora_mlx.config.option import flag
from tlora_mlx.config.training_options import PlanConfig
from tlora_mlx.data.reading import read_rows, tokenize_rows
from tlora_mlx.data.samples import Split
from tlora_mlx.distributed.collectives import from_each, from_first, processes
from tlora_mlx.errors import UserError, counted
from tlora_mlx.method.layers import Linear, target_linears
from tlora_mlx.models.base_model import BaseModel, load_base_model
from tlora_mlx.models.compatibility import mlx_lm_warning
from tlora_mlx.models.model_directory import check_model_name
from tlora_mlx.models.names import unexportable
from tlora_mlx.models.tokenizer import ModelTokenizer, load_tokenizer
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.training.memory import limit_memory
from tlora_mlx.training.prompts import Prompt


@dataclass(frozen=True)
class Setup:
    """The model and data for training or planning.

    Attributes:
        data: the splits ``train``, ``valid`` and ``test``.
        targets: the target modules by full name.
        prompts: those of ``--sample-prompts``.
    """

    base: BaseModel
    data: dict[str, Split]
    targets: dict[str, Linear]
    prompts: Sequence[Prompt] = ()

    def fingerprints(self) -> dict[str, str]:
        """Digests of the model and the tokenized samples, which must not change before a resume."""
        return {"model": self.base.fingerprint()} | {
            f"{name} data": _digest(self.data[name]) for name in ("train", "valid")
        }


def prepare(config: PlanConfig, observer: Observer = SILENT) -> Setup:
    """Load the base model and the data, and find the target modules.

    Args:
        config: the options.
        observer: notified of the splits' contents, and of warnings.

    Raises:
        UserError: one of them does not match the configuration.
    """
    limit_memory()
    # Before the weights, so that an error in the data does not cost their download.
    data, _ = read_data(config, observer)
    base = load_base_model(config.model, config.trust_remote_code)
    blocks = len(base.model.layers)
    if config.num_layers > blocks:
        raise UserError(f"--num-layers {config.num_layers}: the model has only {blocks} blocks")
    try:
        targets = target_linears(
            base.model, config.num_layers, config.target_modules, config.target_experts
        )
    except ValueError as error:
        wanted = config.target_experts and not config.target_modules
        raise UserError(f"--target-{'experts' if wanted else 'modules'}: {error}") from None
    if reason := unexportable(base.config["model_type"], targets):
        if not config.allow_unexportable:
            raise UserError(f"{reason}; train anyway with --allow-unexportable")
        observer.note(f"warning: {reason}; it trains, but tlora_mlx.export will refuse it")
    if warning := mlx_lm_warning(base.name, base.config):
        observer.note(warning)
    setup = Setup(base, data, targets)
    if processes() > 1:
        _compare_processes(config, setup, observer)
    if config.grad_checkpoint:
        enable_grad_checkpoint(base.model)
    return setup


def read_data(
    config: DataConfig, observer: Observer = SILENT
) -> tuple[dict[str, Split], ModelTokenizer]:
    """Read the splits that the options describe; of the model, only the tokenizer is needed.

    Names, files and keys are checked before the tokenizer is loaded or downloaded.

    Args:
        config: the options.
        observer: notified of the splits' contents, and of warnings.

    Returns:
        The splits, and the model's tokenizer.

    Raises:
        UserError: there is no such model or data, or rows are invalid.
    """
    check_model_name(config.model)
    rows = read_rows(**config.for_reading())
    model = load_tokenizer(config.model, config.trust_remote_code)
    data = tokenize_rows(
        rows, model.tokenizer, embeddings=model.embeddings, **config.for_tokenizing()
    )
    longest = max(split.longest() for split in data.values())
    if model.positions is not None and longest > model.positions:
        raise UserError(
            f"a sample has {longest:,} tokens, and the model {config.model} has positions for "
            f"{model.positions:,}; pass --max-seq-length {model.positions}"
        )
    for split in data.values():
        if model.window and (most := split.longest()) > model.window:
            split.warnings.append(
                f"{split.name()} has samples of up to {most:,} tokens, and the model was made for "
                f"{model.window:,}; tokens beyond that are learnt badly"
            )
    for name, split in data.items():
        if text := _described(name, split, config.max_seq_length):
            observer.note(text)
    for warning in dict.fromkeys(w for split in data.values() for w in split.warnings):
        observer.note(f"warning: {warning}")
    return data, model


def _digest(split: Split) -> str:
    # Gaps only if there are any, so that digests from versions without gaps stay the same.
    samples = [[s.tokens, s.first_target, *([s.gaps] if s.gaps else [])] for s in split.samples]
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()


def _compare_processes(config: PlanConfig, setup: Setup, observer: Observer) -> None:
    """Check that all processes have the same model, data and options, wherever they are."""
    options = {k: v for k, v in config.to_dict().items() if k not in ("model", "data")}
    mine: Mapping[str, Any] = {
        **setup.fingerprints(),
        "test data": _digest(setup.data["test"]),
        **{f"option {flag(name)}": value for name, value in options.items()},
    }
    first = from_first(mine)
    faults = from_each([name for name in mine if mine[name] != first[name]])
    for number, names in enumerate(faults):
        if names:
            raise UserError(
                f"process {number} has a different {' and a different '.join(names)} than the "
                "first; all need the same model, data and options"
            )
    if config.batch_size < processes():
        observer.note(
            f"warning: --batch-size {config.batch_size} is split among {processes()} processes, "
            "so some have nothing to do"
        )


def _described(name: str, split: Split, max_seq_length: int) -> str:
    """A split's contents in one line; empty for a split without rows."""
    if not (split.samples or split.left_out):
        return ""
    text = f"{name}: {counted(len(split), 'sample')}"
    if split.truncated:
        text += f", {len(split.truncated)} of them cut to {max_seq_length} tokens"
    if split.left_out:
        text += (
            f"; {counted(len(split.left_out), 'row')} left out, since none of their tokens counts "
            "in the loss"
        )
    return text


def enable_grad_checkpoint(model: nn.Module) -> None:
    """Recompute each block's activations in the backward pass (mlx-lm's own way)."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    for block in {type(block): block for block in model.layers}.values():
        grad_checkpoint(block)
