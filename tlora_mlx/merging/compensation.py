"""Choosing the stored form of W + Δ that keeps what the adapter has learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from tlora_mlx.merging.adjusting import Slopes
from tlora_mlx.merging.grid import Grid, Grouped
from tlora_mlx.merging.refitting import refitted, weighted_error
from tlora_mlx.merging.regridding import made_finer, narrowed
from tlora_mlx.merging.rounding import compensated
from tlora_mlx.method.curvature import Curvature

# Added to a factor's diagonal, as a share of its mean: directions that the samples never show may
# occur later. GPTQ's (mlx_lm/quant/gptq.py).
DAMPING = 0.01
# The same for a weight that gets fewer bits. Its errors are large, and by the samples alone they
# would be large on other texts, and on other rows of the task (docs/BENCHMARKS.md).
COARSER_DAMPING = 1.0


class OutputErrors(NamedTuple):
    """How far a module's outputs are from the adapted model's, weighted by what the loss needs.

    Attributes:
        error: Σ of the squared error.
        delta: the same sum of what Δ changes in the outputs.
    """

    error: float
    delta: float

    def __add__(self, other: OutputErrors) -> OutputErrors:
        return OutputErrors(self.error + other.error, self.delta + other.delta)

    @property
    def relative(self) -> float:
        """The error relative to what Δ changes; 0 if Δ changes nothing."""
        return math.sqrt(self.error / self.delta) if self.delta else 0.0


class Rounded(NamedTuple):
    """A module's stored form.

    Attributes:
        parts: the rows of bytes of its parts, in the file's order.
        outputs: its outputs' errors.
        slopes: by its scales and biases; None in a mode that has no biases.
    """

    parts: list[np.ndarray]
    outputs: OutputErrors
    slopes: Slopes | None


def round_module(
    parts: Sequence[mx.array],
    nearest: Sequence[mx.array],
    delta: np.ndarray,
    grid: Grid,
    onto: Grid,
    curvature: Curvature,
) -> Rounded:
    """Round W + Δ, where W is on its grid already, so that the loss notices least.

    W's own scales are kept at first, so that only Δ is rounded (with other bits: ``regridding``);
    then scales and biases are fitted to the levels that were found. If rounding to nearest has the
    smaller error, it is taken.

    Args:
        parts: how W is stored.
        nearest: how ``mx.quantize`` stores W + Δ.
        delta: Δ (out, in) float32, or 0.
        grid: how the weight is quantized.
        onto: how it is to be, the same but for the number of bits.
        curvature: of the loss at this module.

    Raises:
        ValueError: the curvature cannot be used.
    """
    start = grid.take_apart(parts)
    target = start.dense() + delta
    coarser = onto.bits < grid.bits
    inputs, outputs, size = curvature.damped(COARSER_DAMPING if coarser else DAMPING)
    if onto.bits > grid.bits:
        start = made_finer(target, start, grid, onto)
    elif coarser:
        start = narrowed(target, onto, np.array(mx.diagonal(inputs)))
    found = compensated(target, start, onto, np.array(inputs), np.array(outputs))
    candidates = [(found, parts[1]), (onto.take_apart(nearest), nearest[1])]
    if onto.is_affine:
        candidates.append((refitted(target, found, onto, inputs, outputs), parts[1]))

    def error_of(candidate: tuple[Grouped, mx.array]) -> float:
        return weighted_error(candidate[0].dense() - target, inputs, outputs)

    errors = [error_of(candidate) for candidate in candidates]
    best = int(np.argmin(errors))
    stored = onto.put_together(*candidates[best])
    rounded, error = candidates[best][0], errors[best]
    if coarser:  # what is reported is the task's alone
        inputs, outputs, size = curvature.damped(DAMPING)
        error = weighted_error(rounded.dense() - target, inputs, outputs)
    at_stake = weighted_error(delta, inputs, outputs)
    slopes = Slopes.of(rounded, target, onto, curvature) if onto.is_affine else None
    return Rounded(stored, OutputErrors(size * error, size * at_stake), slopes)
