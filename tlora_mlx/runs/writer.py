"""Writing a run directory: locked while in use, consistent at any moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.data.sources import resolved
from tlora_mlx.errors import RunError, UserError
from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.method.initialise import Initialisation
from tlora_mlx.models.base_model import BaseModel
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.runs.checkpoint import Checkpoint, TrainingState, save_checkpoint
from tlora_mlx.runs.external import ExternalReports
from tlora_mlx.runs.lock import RunLock
from tlora_mlx.runs.padded import PADDED, lora_parameters, padded
from tlora_mlx.runs.progress import Progress
from tlora_mlx.runs.rates import RateSearch
from tlora_mlx.runs.recorder import Recorder
from tlora_mlx.runs.resume import (
    check_fingerprints,
    check_options,
    checkpoint_directories,
    newest_checkpoint,
    own_fingerprints,
)
from tlora_mlx.runs.run_directory import (
    ADAPTERS,
    CHECKPOINTS,
    CONFIG,
    ENERGIES,
    METRICS,
    PLAN,
    RATES,
)
from tlora_mlx.storage.files import read_json, replace_file, write_json
from tlora_mlx.storage.foreign import read_file
from tlora_mlx.storage.safetensors import TensorFile, write_tensors
from tlora_mlx.version import __version__


class RunWriter(Recorder):
    """Writes one run's directory; a context manager that keeps it locked.

    Args:
        path: the directory; nothing is created before ``create``.
        config: the run's options. With ``resume`` the directory may hold a run with the same ones.
        observer: is notified of damaged checkpoints and failing trackers.

    Raises (on entering):
        UserError: the directory holds another run, is in use, or is a file.
    """

    def __init__(self, path: Path, config: TrainConfig, observer: Observer = SILENT):
        self.path, self.config, self._observer = path, config, observer
        self._lock = RunLock(path)
        self._fingerprints: dict[str, str] = {}
        self._external: ExternalReports | None = None
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
        if self._external:
            self._external.close()
        if self._created and not (self.path / PLAN).exists():  # ended before there was a run
            (self.path / METRICS).unlink(missing_ok=True)
            with suppress(OSError):  # somebody else put something there
                self._found or self.path.rmdir()
        self._lock.release()

    def _hold(self) -> None:
        """Lock the directory, then check that it is empty or may be resumed."""
        self._lock.acquire()
        files = (CONFIG, PLAN, ENERGIES, ADAPTERS, METRICS, CHECKPOINTS)
        if links := [name for name in files if (self.path / name).is_symlink()]:
            raise UserError(
                f"in --adapter-path {self.path}, {' and '.join(links)} must not be links; replace "
                "them with what they lead to"
            )
        held = [n for n in (CONFIG, PLAN, ADAPTERS, CHECKPOINTS) if (self.path / n).exists()]
        if not self._created and (self.path / METRICS).exists():
            held += [METRICS] if (self.path / METRICS).stat().st_size else []
        if held and not self.config.resume:
            raise UserError(
                f"--adapter-path {self.path} holds another run ({', '.join(held)}); continue it "
                "with --resume, choose another directory or delete that one"
            )
        if CONFIG in held:
            check_options(self.path, self.config)

    def create(self) -> None:
        """Create the directory and check that it is writable, before anything slow begins.

        Raises:
            UserError: another process has taken it in the meantime.
            RunError: it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._created = True
            self._open_metrics("w").close()
        except OSError as error:
            raise RunError(
                f"cannot write to --adapter-path {self.path}: {error.strerror}"
            ) from None

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest intact checkpoint, as ``resume.newest_checkpoint`` finds it."""
        return newest_checkpoint(self.path, self._observer)

    def rewind(self, checkpoint: Checkpoint, fingerprints: Mapping[str, str]) -> RankPlan:
        """Reset the directory to when the checkpoint was saved, and read the run's plan.

        Args:
            checkpoint: to resume from.
            fingerprints: of the current model and data.

        Raises:
            UserError: model, data or plan have changed since the start; all of them are named.
        """
        self._fingerprints = {**fingerprints, **own_fingerprints(self.path, self.config)}
        check_fingerprints(self.path, self._fingerprints, checkpoint)
        metrics = self.path / METRICS
        reports = read_file(metrics) if metrics.exists() else b""
        if len(reports) < checkpoint.metrics_bytes:
            self._observer.note(
                f"{metrics} is shorter than when checkpoint {checkpoint.state.progress.iteration} "
                "was saved: earlier reports are missing from it"
            )
        if len(reports) != checkpoint.metrics_bytes:
            kept = reports[: checkpoint.metrics_bytes]
            replace_file(metrics, lambda file: file.write(kept))
        return RankPlan.from_dict(read_json(self.path / PLAN, "the run's rank plan"))

    def start(
        self,
        base: BaseModel,
        start: Initialisation,
        fingerprints: Mapping[str, str],
        search: RateSearch | None = None,
    ) -> None:
        """Write the plan, the captured energies by module and the configuration.

        From then on the directory holds a run.

        Args:
            base: the base model.
            start: the plan and A.
            fingerprints: of model and data.
            search: how the learning rate was found, if it was not given.
        """
        plan = start.plan
        if search:
            write_json(self.path / RATES, search.to_dict())
        write_json(self.path / PLAN, plan.to_dict())
        energies = {name: energy._asdict() for name, energy in start.energies.items()}
        write_json(self.path / ENERGIES, energies)
        self._fingerprints = {**fingerprints, **own_fingerprints(self.path, self.config)}
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
                "data": resolved(self.config.data),
                "rank": plan.rank,
                "alpha": plan.alpha,
            },
        )

    def _open_metrics(self, mode: str) -> TextIO:
        """Open ``metrics.jsonl`` for writing, unless it has become a link."""
        return open(
            self.path / METRICS,
            mode,
            encoding="utf-8",
            opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666),
        )

    def report_to_others(self) -> None:
        """Also send reports to the trackers that ``--report-to`` names.

        Raises:
            UserError: a tracker is unknown, not installed, or not set up.
        """
        self._external = ExternalReports(self.path, self.config, self._observer)

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Append one report to ``metrics.jsonl``.

        Raises:
            RunError: it cannot be written.
        """
        try:
            with self._open_metrics("a") as file:
                file.write(json.dumps(metrics, allow_nan=False) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.path / METRICS}: {error.strerror}") from None
        if self._external:
            self._external.report(metrics)

    def checkpoint(self, state: TrainingState) -> None:
        """Save all that the rest of the run depends on; delete checkpoints that are too old.

        Raises:
            RunError: it could not be written; earlier checkpoints are intact.
        """
        with self._open_metrics("a") as reports:
            os.fsync(reports.fileno())
            metrics_bytes = reports.tell()
        directory = self.path / CHECKPOINTS / f"{state.progress.iteration:07d}"
        save_checkpoint(directory, Checkpoint(state, self._fingerprints, metrics_bytes))
        for old in checkpoint_directories(self.path)[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)

    def finish(self, tensors: Mapping[str, mx.array], iteration: int) -> None:
        """Write the complete adapter, A and B, as mlx-lm loads it.

        Raises:
            RunError: it could not be written.
        """
        plan = RankPlan.from_dict(read_json(self.path / PLAN, "the run's rank plan"))
        config = read_json(self.path / CONFIG, "the run's configuration")
        # A run that version 0.1.0 started has no lora_parameters yet.
        write_json(self.path / CONFIG, {**config, "lora_parameters": lora_parameters(plan)})
        metadata = {**PADDED, "iteration": str(iteration)}
        write_tensors(self.path / ADAPTERS, padded(plan, tensors), metadata)

    def is_finished(self, progress: Progress) -> bool:
        """Whether training is done and its final adapter is written.

        There may be an earlier adapter, from an interruption.
        """
        if not progress.finished:
            return False
        try:
            file = TensorFile(self.path / ADAPTERS, "the run's adapter")
        except UserError:  # missing or damaged: to be written again
            return False
        return file.metadata.get("iteration") == str(progress.kept_iteration)
