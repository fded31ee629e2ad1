"""The run as the processes beside the first have it, under ``mlx.launch``: nothing is written."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.nn as nn
import mlx.optimizers as optim

from tlora_mlx.base_model import BaseModel
from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.run_writer import RunWriter
from tlora_mlx.training.checkpoint import Checkpoint, Progress


class Follower(RunWriter):
    """Keeps the best adapter in memory, as ``RunWriter`` does, and leaves the directory alone.

    On another machine there is no such directory; on the same one it is the first process's.
    """

    def __enter__(self) -> Follower:
        return self

    def create(self) -> None:
        """Nothing: the first process makes the directory."""

    def newest_checkpoint(self) -> None:
        """None: the first process reads it and tells (``checkpoint_from_first``)."""

    def is_finished(self, progress: Progress) -> bool:
        """Nothing that counts: the first process knows."""
        return False

    def go_on(self, checkpoint: Checkpoint, fingerprints: Mapping[str, str]) -> None:
        """Take over the best adapter; the first process has compared and read the rest."""
        self.take_best(checkpoint)

    def report_to_others(self) -> None:
        """Nothing: the first process reports."""

    def start(
        self,
        base: BaseModel,
        plan: RankPlan,
        fingerprints: Mapping[str, str],
        energies: Mapping[str, float],
    ) -> None:
        """Nothing: the first process writes the plan and the configuration."""

    def report(self, metrics: Mapping[str, float | None]) -> None:
        """Nothing: the first process reports."""

    def checkpoint(self, model: nn.Module, optimizer: optim.Optimizer, progress: Progress) -> None:
        """Nothing: the first process saves, and all have the same."""

    def finish(self, model: nn.Module, progress: Progress) -> None:
        """Leave the model with the adapter that the first process writes."""
        self.give_best(model)

    def draw(self) -> None:
        """Nothing: the first process draws."""
