"""The interface for what training reports and saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from tlora_mlx.runs.checkpoint import TrainingState


class Recorder:
    """Receives what training reports and saves; this base class ignores it all.

    Under ``mlx.launch`` all processes but the first use this class: on another machine there is no
    run directory, and on the same machine the first process writes it (``writer.RunWriter``).
    """

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Record one report, a line of ``metrics.jsonl``."""

    def checkpoint(self, state: TrainingState) -> None:
        """Save all that the rest of the run depends on."""

    def finish(self, tensors: Mapping[str, mx.array], iteration: int) -> None:
        """Save the resulting adapter and the iteration that it comes from."""
