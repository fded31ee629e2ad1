"""Checkpoints: all that the rest of a run depends on, whole or recognised as damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from tlora_mlx.errors import UserError
from tlora_mlx.files import (
    file_digest,
    new_directory,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from tlora_mlx.method.distributed import from_first, is_first, processes, tensors_from_first

ADAPTERS = "adapters.safetensors"
OPTIMIZER = "optimizer.safetensors"
BEST = "best.safetensors"
STATE = "state.json"


@dataclass
class Window:
    """Sums since the last report."""

    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    updates: int = 0


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        iteration: optimizer updates done, those included that were skipped.
        batches: micro-batches taken from the data; with the seed it gives epoch and order.
        validated: the iteration of the last validation; -1 before the first.
        skipped: updates left out since they were not finite.
        stale: validations in a row that did not improve on ``best_loss``.
        trained_tokens: tokens that counted in the loss so far.
        seconds: spent in updates.
    """

    iteration: int = 0
    batches: int = 0
    validated: int = -1
    skipped: int = 0
    stale: int = 0
    finished: bool = False
    trained_tokens: int = 0
    seconds: float = 0.0
    first_val_loss: float | None = None
    val_loss: float | None = None
    best_loss: float | None = None
    best_iteration: int | None = None
    test_loss: float | None = None
    window: Window = field(default_factory=Window)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Progress:
        """The inverse of ``dataclasses.asdict``."""
        if data.keys() != {item.name for item in fields(cls)}:
            raise UserError("its state is another version's")
        return cls(**{**data, "window": Window(**data["window"])})


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and checked.

    Attributes:
        adapters: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out).
        optimizer: the optimizer's state by flattened name.
        best: ``NAME.lora_b`` of the lowest validation loss, where that was an earlier iteration's.
        fingerprints: of what the run was started with: model, data, plan.
        metrics_bytes: how long ``metrics.jsonl`` was.
    """

    adapters: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    best: dict[str, mx.array]
    progress: Progress
    fingerprints: dict[str, str]
    metrics_bytes: int


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's directory whole.

    A directory that is there already holds the same iteration, and so the same tensors: training is
    deterministic and damaged directories are removed before it begins. Only its state is renewed:
    validation may have come in between.

    Raises:
        RunError: it could not be written; nothing half-written is left.
    """
    if path.exists():
        _write_state(path, checkpoint)
        return
    with new_directory(path) as beside:
        write_tensors(beside / ADAPTERS, checkpoint.adapters, {"format": "mlx"})
        write_tensors(beside / OPTIMIZER, checkpoint.optimizer, {})
        if checkpoint.best:
            write_tensors(beside / BEST, checkpoint.best, {})
        _write_state(beside, checkpoint)


def checkpoint_from_first(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The first process's checkpoint, to all under ``mlx.launch``; the others' is ignored."""
    if processes() == 1:
        return checkpoint
    state = None
    if is_first() and checkpoint:
        state = [asdict(checkpoint.progress), checkpoint.fingerprints, checkpoint.metrics_bytes]
    state = from_first(state)
    if state is None:
        return None
    tensors = [
        tensors_from_first(getattr(checkpoint, name) if is_first() else {})
        for name in ("adapters", "optimizer", "best")
    ]
    return Checkpoint(*tensors, Progress.from_dict(state[0]), *state[1:])


def _write_state(path: Path, checkpoint: Checkpoint) -> None:
    state = {
        "progress": asdict(checkpoint.progress),
        "fingerprints": checkpoint.fingerprints,
        "metrics_bytes": checkpoint.metrics_bytes,
        "files": {
            name: file_digest(path / name)
            for name in (ADAPTERS, OPTIMIZER, *([BEST] if checkpoint.best else []))
        },
    }
    write_json(path / STATE, {**state, "sha256": _digest(state)})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check it against its own digests.

    Raises:
        UserError: a file is missing, damaged, or not what was written.
    """
    state = read_json(path / STATE, "its state")
    if not isinstance(state, dict) or state.pop("sha256", None) != _digest(state):
        raise UserError(f"its state is damaged: {path / STATE}")
    for name, digest in state["files"].items():
        if not (path / name).is_file():
            raise UserError(f"{name} is missing")
        if file_digest(path / name) != digest:
            raise UserError(f"{name} is damaged")
    return Checkpoint(
        read_tensors(path / ADAPTERS, ADAPTERS),
        read_tensors(path / OPTIMIZER, OPTIMIZER),
        read_tensors(path / BEST, BEST) if BEST in state["files"] else {},
        Progress.from_dict(state["progress"]),
        state["fingerprints"],
        state["metrics_bytes"],
    )


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
