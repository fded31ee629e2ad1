"""Checkpoints: all that the rest of a run depends on, with digests that reveal damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from tlora_mlx.distributed.collectives import from_first, is_first, processes, tensors_from_first
from tlora_mlx.errors import UserError
from tlora_mlx.runs.progress import OtherVersionError, Progress
from tlora_mlx.storage.files import file_digest, new_directory, read_json, write_json
from tlora_mlx.storage.safetensors import read_tensors, write_tensors

ADAPTERS = "adapters.safetensors"
OPTIMIZER = "optimizer.safetensors"
BEST = "best.safetensors"
STATE = "state.json"
# What the state of this version consists of.
STATE_TYPES = {"progress": dict, "fingerprints": dict, "metrics_bytes": int, "files": dict}


@dataclass(frozen=True)
class TrainingState:
    """What training continues from.

    Attributes:
        adapters: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out).
        optimizer: the optimizer's state by flattened name.
        best: ``NAME.lora_b`` with the lowest validation loss; empty before any validation.
    """

    adapters: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    best: dict[str, mx.array]
    progress: Progress


@dataclass(frozen=True)
class Checkpoint:
    """A training state, and what ties it to its run.

    Attributes:
        fingerprints: of the model, data and plan that the run was started with.
        metrics_bytes: the size of ``metrics.jsonl`` at the time.
    """

    state: TrainingState
    fingerprints: dict[str, str]
    metrics_bytes: int


def b_matrices(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The ``NAME.lora_b`` among an adapter's tensors."""
    return {name: value for name, value in tensors.items() if name.endswith(".lora_b")}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's directory atomically.

    An existing directory holds the same iteration, and so the same tensors: training is
    deterministic, and damaged directories are removed before it begins. Only its state is updated,
    since there may have been a validation in between.

    Raises:
        RunError: it could not be written; nothing half-written is left.
    """
    if path.exists():
        _write_state(path, checkpoint)
        return
    state = checkpoint.state
    with new_directory(path) as staging:
        write_tensors(staging / ADAPTERS, state.adapters, {"format": "mlx"})
        write_tensors(staging / OPTIMIZER, state.optimizer, {})
        if _has_best_file(state):
            write_tensors(staging / BEST, state.best, {})
        _write_state(staging, checkpoint)


def _has_best_file(state: TrainingState) -> bool:
    """Whether the best B is from an earlier iteration, and so not in the adapter's own file."""
    return bool(state.best) and state.progress.best_iteration != state.progress.iteration


def checkpoint_from_first(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Under ``mlx.launch``, send the first process's checkpoint to all; the others' is ignored."""
    if processes() == 1:
        return checkpoint
    state = None
    if is_first() and checkpoint:
        state = [
            asdict(checkpoint.state.progress),
            checkpoint.fingerprints,
            checkpoint.metrics_bytes,
        ]
    state = from_first(state)
    if state is None:
        return None
    tensors = [
        tensors_from_first(getattr(checkpoint.state, name) if is_first() else {})
        for name in ("adapters", "optimizer", "best")
    ]
    return Checkpoint(TrainingState(*tensors, Progress.from_dict(state[0])), *state[1:])


def _write_state(path: Path, checkpoint: Checkpoint) -> None:
    state = {
        "progress": asdict(checkpoint.state.progress),
        "fingerprints": checkpoint.fingerprints,
        "metrics_bytes": checkpoint.metrics_bytes,
        "files": {
            name: file_digest(path / name, name)
            for name in (ADAPTERS, OPTIMIZER, *([BEST] if _has_best_file(checkpoint.state) else []))
        },
    }
    write_json(path / STATE, {**state, "sha256": _digest(state)})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check it against its own digests.

    Raises:
        UserError: a file is missing, damaged, or was changed.
        UnreadableError: a file cannot be read.
        OtherVersionError: it is intact, but another version wrote it.
    """
    state = read_json(path / STATE, "its state")
    if not isinstance(state, dict) or state.pop("sha256", None) != _digest(state):
        raise UserError(f"its state is damaged: {path / STATE}")
    types = {key: type(value) for key, value in state.items()}
    if types != STATE_TYPES or not state["files"].keys() <= {ADAPTERS, OPTIMIZER, BEST}:
        raise OtherVersionError("its state was written by another version")
    for name, digest in state["files"].items():
        if file_digest(path / name, name) != digest:
            raise UserError(f"{name} is damaged")
    adapters = read_tensors(path / ADAPTERS, ADAPTERS)
    progress = Progress.from_dict(state["progress"])
    best: dict[str, mx.array] = {}
    if BEST in state["files"]:
        best = read_tensors(path / BEST, BEST)
    elif progress.best_iteration == progress.iteration:
        best = b_matrices(adapters)
    optimizer = read_tensors(path / OPTIMIZER, OPTIMIZER)
    return Checkpoint(
        TrainingState(adapters, optimizer, best, progress),
        state["fingerprints"],
        state["metrics_bytes"],
    )


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
