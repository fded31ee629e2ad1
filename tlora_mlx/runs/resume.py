"""What must be unchanged for a run to be resumed: options, model, data and plan."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tlora_mlx.config.option import flag
from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.errors import UserError
from tlora_mlx.observer import Observer
from tlora_mlx.runs.checkpoint import Checkpoint, read_checkpoint
from tlora_mlx.runs.progress import OtherVersionError
from tlora_mlx.runs.run_directory import ADAPTERS, CHECKPOINTS, CONFIG, PLAN
from tlora_mlx.storage.files import UnreadableError, file_digest, read_json, sweep

# A run's result does not depend on these. Model, data and plan are compared by content, wherever
# they are now; an adapter to start from is not read again.
MAY_CHANGE_ON_RESUME = {
    "adapter_path", "model", "data", "plan", "resume", "keep_checkpoints", "save_every",
    "report_to", "project_name", "skip_nonfinite", "trust_remote_code", "from_adapter",
    "sample_prompts",
}  # fmt: skip


# The options of version 0.1.0, in the order of its checkpoints' digests; a later option is part of
# a digest only if it is set, so that earlier runs can be resumed.
FIRST_OPTIONS = (
    "model", "data", "format", "max_samples", "rank", "alpha", "max_rank", "target_modules",
    "target_experts", "num_layers", "calibration_samples", "val_split", "batch_size",
    "max_seq_length", "mask_prompt", "seed", "grad_checkpoint", "allow_unexportable",
    "trust_remote_code", "adapter_path", "resume", "plan", "from_adapter", "covariance",
    "calibration_memory", "iters", "epochs", "optimizer", "learning_rate", "lr_schedule",
    "warmup", "weight_decay", "grad_accumulation_steps", "max_grad_norm", "skip_nonfinite",
    "val_batches", "steps_per_report", "steps_per_eval", "early_stop", "save_every",
    "keep_checkpoints", "report_to", "test",
)  # fmt: skip


def check_options(path: Path, config: TrainConfig) -> None:
    """Check that a run is resumed with the options that it was started with.

    Raises:
        UserError: some differ; all of them are named.
    """
    stored = read_json(path / CONFIG, "the run's configuration")
    differing = [
        f"{flag(name)} {value} (it has {stored.get(name)})"
        for name, value in _binding_options(config, stored).items()
        if value != stored.get(name)
    ]
    if differing:
        raise UserError(
            f"--resume continues {path} with its own options, but these differ: "
            f"{', '.join(differing)}; leave them out, or start another run"
        )


def _binding_options(config: TrainConfig, stored: Mapping[str, object]) -> dict[str, object]:
    """The options that must not change when a run is resumed."""
    # A given plan or adapter brings its own rank and alpha.
    given = stored.get("plan") or stored.get("from_adapter")
    free = MAY_CHANGE_ON_RESUME | ({"rank", "alpha", "max_rank"} if given else set())
    options = config.to_dict()
    later = [
        name
        for name, value in options.items()
        if name not in FIRST_OPTIONS and value != config.__dataclass_fields__[name].default
    ]
    return {name: options[name] for name in (*FIRST_OPTIONS, *later) if name not in free}


def own_fingerprints(path: Path, config: TrainConfig) -> dict[str, str]:
    """Digests of the directory's own options and plan, which may have been edited or damaged.

    Raises:
        UserError: the rank plan is missing.
    """
    options = json.dumps(_binding_options(config, config.to_dict()))
    return {
        "options": hashlib.sha256(options.encode()).hexdigest(),
        "rank plan": file_digest(path / PLAN, "the run's rank plan"),
    }


def check_fingerprints(path: Path, now: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Check that model, data and plan are those that the run was started with.

    Raises:
        UserError: some changed; all of them are named.
    """
    changed = [name for name, value in now.items() if checkpoint.fingerprints.get(name) != value]
    if changed:
        raise UserError(
            f"{path} cannot be resumed: its {' and '.join(changed)} changed since it was "
            "started; restore the original, or start another run"
        )


def checkpoint_directories(path: Path) -> list[Path]:
    """All checkpoints of a run, oldest first; none if there is no directory of them.

    Raises:
        OSError: the directory cannot be read.
    """
    with suppress(FileNotFoundError), os.scandir(path / CHECKPOINTS) as entries:
        names = [e.name for e in entries if e.name.isdigit() and e.is_dir(follow_symlinks=False)]
        return [path / CHECKPOINTS / name for name in sorted(names)]
    return []


def newest_checkpoint(path: Path, observer: Observer) -> Checkpoint | None:
    """The newest intact checkpoint of a run, or None.

    Damaged checkpoints are set aside under another name; half-written files are deleted.

    Raises:
        UserError: another version of this package wrote it, it cannot be read, or there is none
            any more and starting over would replace the run's adapter.
    """
    found = None
    try:
        directories = checkpoint_directories(path)
    except OSError as error:
        raise UserError(f"{path / CHECKPOINTS} cannot be read: {error.strerror}") from None
    for directory in reversed(directories):
        try:
            found = read_checkpoint(directory)
            break
        except OtherVersionError:
            raise UserError(
                f"{directory} was written by another version of tlora_mlx; resume with that "
                "version, or start another run"
            ) from None
        except UnreadableError as error:
            raise UserError(
                f"checkpoint {directory} is not readable ({error}); make it readable, or start "
                "another run"
            ) from None
        except UserError as error:
            aside = _set_aside(directory)
            observer.note(
                f"skipping checkpoint {directory.name}: {error}; it is now called {aside.name}"
            )
    sweep(path, "*")
    sweep(path / CHECKPOINTS, "*")
    if not found and (path / ADAPTERS).exists():  # written after the first checkpoint
        raise UserError(
            f"{path} has an adapter, but no intact checkpoint to resume from, and starting over "
            f"would replace it; restore {path / CHECKPOINTS}, train it further with "
            f"--from-adapter {path} in another directory, or remove {ADAPTERS} to start over"
        )
    if directories and not found:
        observer.note("no checkpoint is intact, so the run starts over")
    return found


def _set_aside(directory: Path) -> Path:
    """Give a damaged checkpoint a name that no checkpoint has; returns its new path."""
    for number in itertools.count(1):
        aside = directory.with_name(f"{directory.name}.damaged-{number}")
        if not os.path.lexists(aside):
            return directory.rename(aside)
