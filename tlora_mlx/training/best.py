"""The adapter with the lowest validation loss, kept in memory until training ends."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.method.layers import adapter_tensors, restore_b
from tlora_mlx.runs.checkpoint import b_matrices


class BestAdapter:
    """B at the lowest validation loss so far; A never changes.

    Attributes:
        b: ``NAME.lora_b`` (rank, out); empty before the first validation.
    """

    def __init__(self, b: Mapping[str, mx.array] | None = None):
        self.b = dict(b or {})

    def keep(self, model: nn.Module) -> None:
        """Keep a copy of the model's current B."""
        self.b = b_matrices(adapter_tensors(model))

    def restore(self, model: nn.Module) -> None:
        """Put the B that was kept, if any, back into the model."""
        restore_b(model, self.b)
