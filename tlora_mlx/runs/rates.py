"""Learning rates that were tried before a run, and the one to take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tlora_mlx.errors import UserError, counted
from tlora_mlx.storage.files import read_json

# Losses that differ by less than this share of the improvement are taken for level. Of level rates
# the lowest is recommended: a long run's best rate lies below a short run's, never above it.
LEVEL = 0.002
# The bar of the largest improvement, in characters.
BAR = 40


@dataclass(frozen=True)
class Trial:
    """A short run at one learning rate.

    Attributes:
        rate: the peak learning rate.
        loss: the validation loss after it, nats per token; None if training did not stay finite.
    """

    rate: float
    loss: float | None


@dataclass(frozen=True)
class RateSearch:
    """What a search for a learning rate has found.

    Attributes:
        updates: how many each trial made.
        before: the validation loss before any update.
        trials: by rising rate; at least one has a loss below ``before``.
    """

    updates: int
    before: float
    trials: list[Trial]

    @property
    def recommended(self) -> float:
        """The lowest rate whose loss is level with the lowest loss."""
        losses = {t.rate: t.loss for t in self.trials if t.loss is not None}
        lowest = min(losses.values())
        level = lowest + LEVEL * (self.before - lowest)
        return min(rate for rate, loss in losses.items() if loss <= level)

    def summary(self) -> list[str]:
        """A line and a bar for each rate; a longer bar is a larger improvement."""
        after = counted(self.updates, "update")
        lines = [f"validation loss after {after}, {self.before:.4f} before:"]
        gains = {t.rate: self.before - t.loss for t in self.trials if t.loss is not None}
        for trial in self.trials:
            if trial.loss is None:
                lines.append(f"  {trial.rate:8.2g}  not finite")
                continue
            bar = "█" * round(BAR * max(gains[trial.rate], 0.0) / max(gains.values()))
            mark = " <- recommended" if trial.rate == self.recommended else ""
            lines.append(f"  {trial.rate:8.2g}  {trial.loss:.4f}  {bar}{mark}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; ``recommended`` for whoever reads the file."""
        return {"recommended": self.recommended, **asdict(self)}


def read_rates(path: Path) -> RateSearch | None:
    """The search that a run's rate comes from; None if its rate was given.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    data = read_json(path, "the learning rates that were tried")
    try:
        trials = [
            Trial(float(t["rate"]), None if t["loss"] is None else float(t["loss"]))
            for t in data["trials"]
        ]
        search = RateSearch(int(data["updates"]), float(data["before"]), trials)
        search.recommended  # noqa: B018  without a loss there is none
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path} does not contain the learning rates tried; delete it") from None
    return search
