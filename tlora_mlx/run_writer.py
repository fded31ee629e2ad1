"""Writing a run directory: locked while it is in use, whole at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from tlora_mlx.base_model import BaseModel
from tlora_mlx.config import TrainConfig
from tlora_mlx.errors import RunError, UserError, first_line
from tlora_mlx.files import (
    file_digest,
    read_json,
    replace_file,
    user_path,
    write_json,
    write_tensors,
)
from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.method.layers import adapter_tensors, restore_b
from tlora_mlx.pictures import can_draw, draw_losses
from tlora_mlx.run_directory import ADAPTERS, CHECKPOINTS, CONFIG, ENERGIES, LOSSES, METRICS, PLAN
from tlora_mlx.terminal import say
from tlora_mlx.training.checkpoint import Checkpoint, Progress, read_checkpoint, save_checkpoint
from tlora_mlx.version import __version__

# Options that a resumed run may change: what it computes does not depend on them. Model, data and
# plan are compared by content, wherever they lie now; an adapter to start from is not read again.
FREE = {"adapter_path", "model", "data", "plan", "resume", "keep_checkpoints", "save_every"}
FREE |= {"report_to", "skip_nonfinite", "trust_remote_code", "from_adapter"}


class RunWriter:
    """Writes one run's directory; as a context manager, holds it alone until it is left.

    Args:
        path: the directory; nothing is made before ``create``.
        config: the run's options. With ``resume`` it may hold a run already, with the same ones.

    Raises (on entering):
        UserError: the directory holds another run, is in use, or is no directory.
    """

    def __init__(self, path: Path, config: TrainConfig):
        self.path, self.config = path, config
        self._fingerprints: dict[str, str] = {}
        self._best: dict[str, mx.array] = {}
        self._callback = None
        self._lock: int | None = None
        self._found = self._created = False

    def __enter__(self) -> RunWriter:
        self._found = self.path.exists()
        if self._found and not self.path.is_dir():
            raise UserError(f"--adapter-path {self.path} is a file; choose a directory")
        if self._found:
            try:
                self._hold()
            except UserError:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._created and not (self.path / PLAN).exists():  # it ended before there was a run
            (self.path / METRICS).unlink(missing_ok=True)
            with suppress(OSError):  # others put something there
                self._found or self.path.rmdir()
        if self._lock is not None:
            os.close(self._lock)

    def _hold(self) -> None:
        """Lock the directory, then see that it is free or may be gone on with.

        The system lets go of the lock when the process ends, however it does.
        """
        if self._lock is None:
            self._lock = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"--adapter-path {self.path} is in use by another training process; wait for "
                    "it or choose another directory"
                ) from None
            except OSError:  # a file system without locks
                pass
        held = [n for n in (CONFIG, PLAN, ADAPTERS, CHECKPOINTS) if (self.path / n).exists()]
        if not self._created and (self.path / METRICS).exists():
            held += [METRICS] if (self.path / METRICS).stat().st_size else []
        if held and not self.config.resume:
            raise UserError(
                f"--adapter-path {self.path} holds another run ({', '.join(held)}); go on with it "
                "by --resume, choose another directory or delete that one"
            )
        if CONFIG in held:
            self._check_options()

    def _check_options(self) -> None:
        """See that a run is gone on with as it was started."""
        stored = read_json(self.path / CONFIG, "the run's configuration")
        differing = [
            f"--{name.replace('_', '-')} {value} (it has {stored.get(name)})"
            for name, value in self._binding_options(stored).items()
            if value != stored.get(name)
        ]
        if differing:
            raise UserError(
                f"--resume goes on with {self.path} as it was started, and these differ: "
                f"{', '.join(differing)}; leave them out, or start another run"
            )

    def _binding_options(self, stored: Mapping[str, object]) -> dict[str, object]:
        """The options that a resumed run must have as they are."""
        # A given plan or adapter brings its own rank and alpha.
        given = stored.get("plan") or stored.get("from_adapter")
        free = FREE | ({"rank", "alpha", "max_rank"} if given else set())
        return {k: v for k, v in self.config.to_dict().items() if k not in free}

    def _own_fingerprints(self) -> dict[str, str]:
        """Of what the directory itself says of the run: it may be edited or damaged."""
        options = json.dumps(self._binding_options(self.config.to_dict()))
        return {
            "options": hashlib.sha256(options.encode()).hexdigest(),
            "rank plan": self._plan_digest(),
        }

    def create(self) -> None:
        """Make the directory and see that it can be written to, before anything takes long.

        Raises:
            UserError: another process has taken it in the meantime, or what reports go to is not
                there.
            RunError: it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._created = True
            (self.path / METRICS).write_text("")
        except OSError as error:
            raise RunError(
                f"cannot write to --adapter-path {self.path}: {error.strerror}"
            ) from None

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, ready to go on from; None where there is none.

        Damaged ones are told of and removed, and so is what was written after it.

        Raises:
            RunError: the directory cannot be written to.
        """
        found = None
        paths = self._checkpoints()
        for path in reversed(paths):
            try:
                found = read_checkpoint(path)
                break
            except UserError as error:
                say(f"checkpoint {path.name} is skipped: {error}")
                shutil.rmtree(path)
        for left in (*self.path.glob(".*.part"), *self.path.glob(f"{CHECKPOINTS}/.*.part")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if paths and not found:
            say("no checkpoint is whole, so the run begins again")
        return found

    def go_on(self, checkpoint: Checkpoint, fingerprints: Mapping[str, str]) -> RankPlan:
        """Take the directory back to where the checkpoint was made, and read the run's plan.

        Args:
            checkpoint: to go on from.
            fingerprints: of the model and the data as they are now.

        Raises:
            UserError: model, data or plan are not what the run was started with; all are named.
        """
        self._fingerprints = {**fingerprints, **self._own_fingerprints()}
        changed = [k for k, v in self._fingerprints.items() if checkpoint.fingerprints.get(k) != v]
        if changed:
            raise UserError(
                f"{self.path} cannot be resumed: its {' and '.join(changed)} changed since it was "
                "started; bring back what it was, or start another run"
            )
        self.take_best(checkpoint)
        metrics = self.path / METRICS
        reports = metrics.read_bytes() if metrics.exists() else b""
        if len(reports) != checkpoint.metrics_bytes:
            kept = reports[: checkpoint.metrics_bytes]
            replace_file(metrics, lambda beside: beside.write_bytes(kept))
        return RankPlan.from_dict(read_json(self.path / PLAN, "the run's rank plan"))

    def take_best(self, checkpoint: Checkpoint) -> None:
        """Keep the checkpoint's B of the lowest validation loss."""
        self._best = checkpoint.best
        if checkpoint.progress.best_iteration == checkpoint.progress.iteration:
            self._best = _b_matrices(checkpoint.adapters)

    def start(
        self,
        base: BaseModel,
        plan: RankPlan,
        fingerprints: Mapping[str, str],
        energies: Mapping[str, float],
    ) -> None:
        """Write the plan, the captured energies by module and the configuration.

        From here on the directory is a run's.
        """
        write_json(self.path / PLAN, plan.to_dict())
        write_json(self.path / ENERGIES, dict(energies))
        self._fingerprints = {**fingerprints, **self._own_fingerprints()}
        data = user_path(self.config.data)
        write_json(
            self.path / CONFIG,
            {
                "fine_tune_type": "tlora",
                "model_type": base.config["model_type"],
                "base_model": base.original,
                "versions": {
                    "tlora_mlx": __version__,
                    **{package: version(package) for package in ("mlx", "mlx-lm", "transformers")},
                },
                **{k: v for k, v in self.config.to_dict().items() if k != "resume"},
                "model": base.name,
                "data": str(data.resolve()) if data.exists() else self.config.data,
                "rank": plan.rank,
                "alpha": plan.alpha,
            },
        )

    def _plan_digest(self) -> str:
        if not (self.path / PLAN).is_file():
            raise UserError(f"the run's rank plan is missing: there is no {self.path / PLAN}")
        return file_digest(self.path / PLAN)

    def report_to_others(self) -> None:
        """Let reports go to what ``--report-to`` names too, through mlx-lm's callbacks.

        Raises:
            UserError: it is not known, not installed, or not set up.
        """
        from mlx_lm.tuner.callbacks import get_reporting_callbacks

        try:
            self._callback = get_reporting_callbacks(
                self.config.report_to,
                project_name="tlora_mlx",
                log_dir=str(self.path),
                config=self.config.to_dict(),
            )
        except Exception as error:  # not known, not installed, not logged in, no network
            raise UserError(f"--report-to {self.config.report_to}: {first_line(error)}") from None

    def report(self, metrics: Mapping[str, float | None]) -> None:
        """Append one report to ``metrics.jsonl``.

        Raises:
            RunError: it cannot be written.
        """
        try:
            with (self.path / METRICS).open("a") as file:
                file.write(json.dumps(metrics, allow_nan=False) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.path / METRICS}: {error.strerror}") from None
        try:
            if self._callback and "train_loss" in metrics:
                self._callback.on_train_loss_report(dict(metrics))
            if self._callback and "val_loss" in metrics:
                self._callback.on_val_loss_report(dict(metrics))
        except Exception as error:  # a lost connection must not end a run
            self._callback = None
            say(f"--report-to {self.config.report_to} is given up: {first_line(error)}")

    def checkpoint(self, model: nn.Module, optimizer: optim.Optimizer, progress: Progress) -> None:
        """Save all that the rest of the run depends on; remove what is older than is kept.

        Raises:
            RunError: it could not be written; the checkpoints before are whole.
        """
        with (self.path / METRICS).open("rb+") as reports:
            os.fsync(reports.fileno())
            metrics_bytes = reports.seek(0, os.SEEK_END)
        state = Checkpoint(
            adapter_tensors(model),
            dict(tree_flatten(optimizer.state)),
            {} if progress.best_iteration == progress.iteration else self._best,
            progress,
            self._fingerprints,
            metrics_bytes,
        )
        save_checkpoint(self.path / CHECKPOINTS / f"{progress.iteration:07d}", state)
        for old in self._checkpoints()[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)

    def _checkpoints(self) -> list[Path]:
        """All checkpoints' directories, oldest first."""
        paths = (self.path / CHECKPOINTS).glob("*")
        return sorted(p for p in paths if p.name.isdigit() and p.is_dir())

    def best(self, model: nn.Module) -> None:
        """Keep B as it is: the validation loss is the lowest so far."""
        self._best = _b_matrices(adapter_tensors(model))

    def finish(self, model: nn.Module, progress: Progress) -> None:
        """Write the adapter, A and B, complete by itself; the model is left with it.

        It is the one of the lowest validation loss, or the last where nothing was validated.

        Raises:
            RunError: it could not be written.
        """
        self.give_best(model)
        metadata = {"format": "mlx", "iteration": str(_kept(progress))}
        write_tensors(self.path / ADAPTERS, adapter_tensors(model), metadata)

    def give_best(self, model: nn.Module) -> None:
        """Leave the model with the B of the lowest validation loss, where there was one."""
        restore_b(model, self._best)

    def draw(self) -> None:
        """Draw the losses as ``loss.png``, where matplotlib is installed and the reports whole."""
        try:
            if can_draw():
                draw_losses(self.path / METRICS, self.path / LOSSES)
        except (RunError, ValueError) as error:
            say(f"{LOSSES} is not drawn: {first_line(error)}")

    def is_finished(self, progress: Progress) -> bool:
        """Whether training is done and the adapter that it ended with is written.

        An earlier adapter may lie there, from an interruption.
        """
        from safetensors import SafetensorError, safe_open

        if not progress.finished or not (self.path / ADAPTERS).exists():
            return False
        try:
            with safe_open(str(self.path / ADAPTERS), "np") as file:
                iteration = (file.metadata() or {}).get("iteration")
        except SafetensorError:  # damaged: to be written again
            return False
        return iteration == str(_kept(progress))


def _kept(progress: Progress) -> int:
    """The iteration whose adapter is kept."""
    best = progress.best_iteration
    return progress.iteration if best is None else best


def _b_matrices(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {name: value for name, value in tensors.items() if name.endswith(".lora_b")}
