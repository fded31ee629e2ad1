"""Reading a model back that was quantized again: what was written, and what survives in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import adapter_delta
from tlora_mlx.adapters.proof import Errors, Proof, mismatch_error
from tlora_mlx.errors import UserError, counted
from tlora_mlx.evaluation.survival import ChosenBits, Survival, TaskLosses
from tlora_mlx.merging.compensation import OutputErrors
from tlora_mlx.merging.conversion import StoredWeight
from tlora_mlx.models.weights import ModelWeights
from tlora_mlx.storage.blocks import blocks
from tlora_mlx.storage.safetensors import TensorFile


class QuantizedProof(Proof):
    """What reading back a requantized model has shown.

    Attributes:
        outputs: for each module that was rounded by the task, the error of its outputs and what Δ
            changes in them, each squared, summed, and weighted by what the loss depends on.
        losses: the task's losses; None without a task.
        bits: what the task chose; None if every module keeps its own.
    """

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.outputs: dict[str, OutputErrors] = {}
        self.losses: TaskLosses | None = None
        self.bits: ChosenBits | None = None

    def summary(self) -> str:
        """One line for the user: how much of the deltas or, with a task, of its effect survives."""
        verified = f"verified {len(self.modules)} modules, quantized again: "
        if self.losses:
            bits = f"; {self.bits.summary()}" if self.bits else ""
            return (
                f"{verified}{self.losses.summary()}{self._outputs()}{bits} (--dequantize keeps it "
                "all)"
            )
        least = self.worst(lambda errors: -errors.surviving)
        return (
            f"{verified}{self.total.surviving:.1%} of the delta survives overall, "
            f"{self.modules[least].surviving:.1%} in {least}; relative error "
            f"{self.total.relative:.2g} (--dequantize keeps the whole delta)"
        )

    def _outputs(self) -> str:
        """How far the outputs are off, and how many modules could not be rounded by the task."""
        plain = len(self.modules.keys() - self.outputs.keys())
        others = (
            f"; {counted(plain, 'module')} rounded to nearest (expert, not quantized, or without "
            "effect on the loss)"
            if plain
            else ""
        )
        if not self.outputs:
            return others
        worst = max(self.outputs, key=lambda name: self.outputs[name].relative)
        overall = sum(self.outputs.values(), OutputErrors(0.0, 0.0)).relative
        return (
            f"; relative error of the outputs {overall:.2g} overall, "
            f"{self.outputs[worst].relative:.2g} in {worst}{others}"
        )

    def survival(self) -> Survival:
        """What ``survival.json`` holds; the losses must have been measured."""
        errors = {name: found.relative for name, found in self.outputs.items()}
        plain = sorted(self.modules.keys() - errors.keys())
        return Survival(self.losses, errors, plain, self.bits)


def prove_weight(
    adapter: Adapter,
    base: ModelWeights,
    weight: StoredWeight,
    written: Mapping[str, TensorFile],
    digests: Mapping[str, list[str]],
    proof: Proof,
) -> None:
    """Compare one weight's parts with what should be there, and measure what survives of Δ.

    That is what was rounded by the task, by its digests, or W + Δ rounded to nearest. Experts
    without an adapter are compared with the base model, bit for bit.

    Raises:
        RunError: it is something else.
        UserError: it is not finite.
    """
    for first, last, name in weight.pieces():
        factors = adapter_delta(adapter, name) if name else None
        expected_digests = digests.get(name or weight.name)
        found_digests = [sha256() for _ in weight.parts]
        for i, j in blocks(last - first, weight.shape[-1]):
            start, stop = first + i, first + j
            found = part_bytes(weight.read(written, start, stop))
            for digest, data in zip(found_digests, found, strict=True):
                digest.update(data)
            if not (factors or weight.has_changed):
                expected = part_bytes(weight.read(base.file_of, start, stop))
            else:
                before = weight.before.dense(base.file_of, start, stop)
                delta = factors.rows(i, j).product() if factors else 0 * before
                expected = part_bytes(weight.nearest(before + delta))
                after = weight.dense(written, start, stop)
                if not np.isfinite(after).all():
                    raise UserError(f"{name} with its delta is not finite once quantized")
                if name:
                    proof.add(name, Errors.of(after - before - delta, delta))
            if not expected_digests and not all(map(np.array_equal, found, expected)):
                raise mismatch_error(name or "the unadapted bytes")
        if expected_digests and expected_digests != [d.hexdigest() for d in found_digests]:
            raise mismatch_error(weight.name)


def part_bytes(parts: Sequence[mx.array]) -> list[np.ndarray]:
    """A weight's parts as rows of bytes, as they are written."""
    return [np.array(part.view(mx.uint8)) for part in parts]
