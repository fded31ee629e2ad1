"""How far a training run has come."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from tlora_mlx.errors import UserError


class OtherVersionError(UserError):
    """Something is intact, but only another version of this package understands it."""


@dataclass
class Window:
    """Sums since the last report."""

    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    updates: int = 0


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        iteration: optimizer updates done, including skipped ones.
        batches: micro-batches taken from the data; with the seed, this gives epoch and order.
        validated: the iteration of the last validation; -1 before the first.
        skipped: updates skipped because they were not finite.
        stale: consecutive validations without an improvement on ``best_loss``.
        trained_tokens: tokens that counted in the loss so far.
        seconds: time spent in updates.
    """

    iteration: int = 0
    batches: int = 0
    validated: int = -1
    skipped: int = 0
    stale: int = 0
    finished: bool = False
    trained_tokens: int = 0
    seconds: float = 0.0
    first_val_loss: float | None = None
    best_loss: float | None = None
    best_iteration: int | None = None
    test_loss: float | None = None
    window: Window = field(default_factory=Window)

    def count(self, loss: float, tokens: int, seconds: float) -> None:
        """Count one update: its summed loss, the number of tokens in that sum, and its time."""
        self.trained_tokens += tokens
        self.seconds += seconds
        self.window.loss += loss
        self.window.tokens += tokens
        self.window.seconds += seconds
        self.window.updates += 1

    @property
    def kept_iteration(self) -> int:
        """The iteration whose adapter is kept: that of the lowest validation loss, or the last."""
        return self.iteration if self.best_iteration is None else self.best_iteration

    @classmethod
    def from_dict(cls, data: Any) -> Progress:
        """The inverse of ``dataclasses.asdict``.

        Raises:
            OtherVersionError: another version wrote it.
        """
        data = dict(data) if isinstance(data, dict) else {}
        data.pop("val_loss", None)  # up to 0.1
        for kind, found in ((cls, data), (Window, data.get("window"))):
            if not isinstance(found, dict) or found.keys() != {f.name for f in fields(kind)}:
                raise OtherVersionError("its state was written by another version")
        return cls(**{**data, "window": Window(**data["window"])})
