"""Reports to experiment trackers (``--report-to``): mlx-lm's callbacks, and two of our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.errors import UserError, first_line
from tlora_mlx.observer import Observer


class _Tracker(Protocol):
    """The interface of mlx-lm's callbacks (ml-explore/mlx-lm, ``mlx_lm/tuner/callbacks.py``)."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None: ...

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None: ...


class _OwnTracker:
    """A tracker that takes all reports alike."""

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Send one report."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """As mlx-lm's trainer calls it."""
        self.report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """As mlx-lm's trainer calls it."""
        self.report(val_info)

    def close(self) -> None:
        """Send what is left."""


class _TensorBoard(_OwnTracker):
    """Event files in the run's ``tensorboard/``, for ``tensorboard --logdir``.

    They are created with the first report, when the run directory exists.
    """

    def __init__(self, path: Path, config: TrainConfig):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError("tensorboardX is not installed: pip install tensorboardX") from None
        self._make: Callable[[str], Any] = SummaryWriter
        self._path, self._options = path / "tensorboard", config.to_dict()
        self._writer: Any = None

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Every number as a scalar, at its iteration."""
        if self._writer is None:
            self._writer = self._make(str(self._path))
            options = "\n".join(f"    {name}: {value}" for name, value in self._options.items())
            self._writer.add_text("options", options)
        for name, value in metrics.items():
            if name != "iteration" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, metrics["iteration"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class _Trackio(_OwnTracker):
    """trackio's local database (``TRACKIO_DIR``), for ``trackio show``."""

    def __init__(self, path: Path, config: TrainConfig):
        try:
            import trackio
        except ImportError:
            raise ImportError("trackio is not installed: pip install trackio") from None
        self._run = trackio.init(
            project=config.project_name,
            name=path.resolve().name,
            config=config.to_dict(),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def report(self, metrics: Mapping[str, Any]) -> None:
        """All of it, at its iteration."""
        values = {name: value for name, value in metrics.items() if name != "iteration"}
        self._run.log(values, step=metrics["iteration"])

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


_OWN = {"tensorboard": _TensorBoard, "trackio": _Trackio}
_MLX_LM = ("wandb", "swanlab")


class ExternalReports:
    """The trackers that ``--report-to`` names, if any.

    Args:
        path: the run directory, where trackers keep their own files.
        config: the run's options.
        observer: is notified if a tracker fails during training, which does not end the run.

    Raises:
        UserError: a tracker is unknown, not installed, or not set up.
    """

    def __init__(self, path: Path, config: TrainConfig, observer: Observer):
        self._name, self._observer = config.report_to, observer
        self._trackers: list[_Tracker] = []
        names = [name.strip().lower() for name in (config.report_to or "").split(",")]
        try:
            for name in filter(None, names):
                self._trackers.append(_tracker(name, path, config))
        except Exception as error:  # unknown, not installed, not logged in, no network
            raise UserError(f"--report-to {config.report_to}: {first_line(error)}") from None

    def report(self, metrics: Mapping[str, float | None]) -> None:
        """Forward one report; a lost connection does not end the run."""
        try:
            for tracker in self._trackers:
                if "train_loss" in metrics:
                    tracker.on_train_loss_report(dict(metrics))
                if "val_loss" in metrics:
                    tracker.on_val_loss_report(dict(metrics))
        except Exception as error:
            self._stop(error)

    def close(self) -> None:
        """Have the trackers send what is left."""
        try:
            for tracker in self._trackers:
                if isinstance(tracker, _OwnTracker):
                    tracker.close()
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._trackers = []
        self._observer.note(
            f"--report-to {self._name} stopped: {first_line(error)}; training continues"
        )


def _tracker(name: str, path: Path, config: TrainConfig) -> _Tracker:
    """One tracker by its name.

    Raises:
        ValueError: there is none of that name.
        Exception: whatever it raises when it is not installed or not set up.
    """
    if name in _OWN:
        return _OWN[name](path, config)
    if name not in _MLX_LM:
        raise ValueError(f"there is no '{name}'; choose from {', '.join((*_MLX_LM, *_OWN))}")
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    return get_reporting_callbacks(
        name, project_name=config.project_name, log_dir=str(path), config=config.to_dict()
    )
