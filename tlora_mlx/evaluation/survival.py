"""What is left of an adapter in a model that was quantized again: measured, and kept in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tlora_mlx.errors import UserError, counted
from tlora_mlx.storage.files import read_json, write_json
from tlora_mlx.storage.foreign import file_in

# In the directory of an export that was rounded by the task.
SURVIVAL = "survival.json"


@dataclass(frozen=True)
class TaskLosses:
    """What is left of an adapter's effect, in nats per counted token of the same samples.

    Attributes:
        base: the loss without the adapter.
        adapter: with it, in full precision.
        merged: of what was written.
        samples: how many samples were measured.
        split: of which split they are.
    """

    base: float
    adapter: float
    merged: float
    samples: int
    split: str

    @property
    def measured(self) -> str:
        """On what: "32 validation samples"."""
        return counted(self.samples, f"{self.split} sample")

    @property
    def kept(self) -> float | None:
        """The share of the improvement that is left; None if the adapter improves nothing."""
        gained = self.base - self.adapter
        return (self.base - self.merged) / gained if gained > 0 else None

    def summary(self) -> str:
        """For the user, without a full stop."""
        losses = (
            f"loss {self.base:.4f} without the adapter, {self.adapter:.4f} with it, "
            f"{self.merged:.4f} merged, on {self.measured}"
        )
        if self.kept is None:
            return f"the adapter does not improve the {losses}"
        return f"{self.kept:.1%} of the adapter's improvement is left ({losses})"


@dataclass(frozen=True)
class ChosenBits:
    """How many bits the quantized modules of a model have, where the task chose them.

    Attributes:
        modules: how many modules have so many bits; in the file, numbers are texts.
        per_weight: the model's bits per weight, by mlx-lm's measure.
        before: those that it had.
    """

    modules: dict[str, int]
    per_weight: float
    before: float

    def summary(self) -> str:
        """For the user, without a full stop."""
        counts = sorted(self.modules.items(), key=lambda item: int(item[0]))
        first, *others = (f"{number} at {bits}" for bits, number in counts)
        listed = ", ".join([first.replace(" at ", " modules at ") + " bits", *others])
        return f"{listed}; {self.per_weight:.2f} bits per weight, {self.before:.2f} before"


@dataclass(frozen=True)
class Survival:
    """The content of ``survival.json``.

    Attributes:
        losses: the task's losses.
        output_errors: for each module that was rounded by the task, the error of its outputs that
            rounding made, relative to what the adapter changes in them.
        rounded_to_nearest: the other modules: experts, weights that are not quantized, and those
            on which the samples' loss does not depend.
        bits: what the task chose; None if every module keeps its own.
    """

    losses: TaskLosses
    output_errors: dict[str, float]
    rounded_to_nearest: Sequence[str] = field(default_factory=list)
    bits: ChosenBits | None = None

    def write(self, directory: Path) -> None:
        """Write the file."""
        content = asdict(self) | {"relative_output_errors": self.output_errors}
        del content["output_errors"]
        content["losses"]["kept"] = self.losses.kept
        if self.bits is None:
            del content["bits"]
        write_json(directory / SURVIVAL, content)


def read_survival(directory: Path) -> Survival | None:
    """What ``Survival.write`` wrote; None if the directory has no such file.

    Raises:
        UserError: it is damaged, or a link to elsewhere.
    """
    path = file_in(directory, SURVIVAL)
    if not path.exists():
        return None
    found = read_json(path, "what the export keeps")
    try:
        losses = {key: value for key, value in found["losses"].items() if key != "kept"}
        bits = ChosenBits(**found["bits"]) if "bits" in found else None
        survival = Survival(
            TaskLosses(**losses), found["relative_output_errors"], found["rounded_to_nearest"], bits
        )
        numbers = [losses[key] for key in ("base", "adapter", "merged")]
        if bits:
            bits.summary()
        if not all(map(math.isfinite, [*numbers, *survival.output_errors.values()])):
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"{path} does not say what the export keeps; delete it or export again"
        ) from None
    return survival
