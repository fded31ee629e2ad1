"""Where a training run's reports and states go."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from tlora_mlx.runs.checkpoint import TrainingState


class Recorder:
    """Takes what training reports and saves; this one drops it all.

    The processes beside the first under ``mlx.launch`` use it as it is: on another machine there is
    no run directory, on the same one it is the first process's (``writer.RunWriter``).
    """

    def report(self, metrics: Mapping[str, float | None]) -> None:
        """Take one report, as a line of ``metrics.jsonl`` holds it."""

    def checkpoint(self, state: TrainingState) -> None:
        """Keep all that the rest of the run depends on."""

    def finish(self, tensors: Mapping[str, mx.array], iteration: int) -> None:
        """Keep the adapter that the run came to, and the iteration that it is of."""
