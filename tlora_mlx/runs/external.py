"""Reports to experiment trackers (``--report-to``), through mlx-lm's callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.errors import UserError, first_line
from tlora_mlx.observer import Observer


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
        from mlx_lm.tuner.callbacks import get_reporting_callbacks

        self._name, self._observer = config.report_to, observer
        try:
            self._callback = get_reporting_callbacks(
                config.report_to,
                project_name=config.project_name,
                log_dir=str(path),
                config=config.to_dict(),
            )
        except Exception as error:  # unknown, not installed, not logged in, no network
            raise UserError(f"--report-to {config.report_to}: {first_line(error)}") from None

    def report(self, metrics: Mapping[str, float | None]) -> None:
        """Forward one report; a lost connection does not end the run."""
        try:
            if self._callback and "train_loss" in metrics:
                self._callback.on_train_loss_report(dict(metrics))
            if self._callback and "val_loss" in metrics:
                self._callback.on_val_loss_report(dict(metrics))
        except Exception as error:
            self._callback = None
            self._observer.note(
                f"--report-to {self._name} stopped: {first_line(error)}; training continues"
            )
