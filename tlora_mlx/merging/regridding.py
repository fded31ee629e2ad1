"""Scales and biases to begin with where a weight is stored with another number of bits."""

from __future__ import annotations

import numpy as np

from tlora_mlx.merging.grid import Grid, Grouped

# How much narrower than a group's extremes the levels may lie: few bits serve many weights better
# if the outermost ones are cut.
SHARES = np.linspace(1.0, 0.4, 13)


def regridded(
    target: np.ndarray, start: Grouped, grid: Grid, onto: Grid, importance: np.ndarray
) -> Grouped:
    """Scales and biases for another number of bits, and the levels nearest to a matrix.

    With more bits the old levels stay among the new ones, so that nothing but Δ is rounded. With
    fewer, each group gets the range for which Σ_j importance_j (Q − W)_ij² is least, of several.

    Args:
        target: W (out, in) float32.
        start: where it came from, on ``grid``.
        grid: affine.
        onto: the same but for the number of bits.
        importance: of each column, (in,) float32.
    """
    rows, columns = target.shape
    groups = columns // onto.group_size
    values = target.reshape(rows, groups, -1)

    def nearest(scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
        safe = np.where(scales == 0, 1, scales)[..., None]
        return onto.nearest((values - biases[..., None]) / safe)

    if onto.bits >= grid.bits:
        scales, biases = onto.stored(start.scales / 2 ** (onto.bits - grid.bits)), start.biases
        return Grouped(nearest(scales, biases).reshape(target.shape), scales, biases)
    low, high = values.min(-1), values.max(-1)
    weights = importance.reshape(groups, -1)
    best = [np.zeros(values.shape, np.float32), low, low]
    least = np.full(low.shape, np.inf, np.float32)
    for share in SHARES:
        middle, half = (low + high) / 2, share * (high - low) / 2
        scales = onto.stored(2 * half / (2**onto.bits - 1))
        biases = onto.stored(middle - half)
        levels = nearest(scales, biases)
        error = levels * scales[..., None] + biases[..., None] - values
        error = (weights * error * error).sum(-1)
        better = error < least
        least = np.where(better, error, least)
        for i, found in enumerate((levels, scales, biases)):
            where = better[..., None] if i == 0 else better
            best[i] = np.where(where, found, best[i])
    levels, scales, biases = best
    return Grouped(levels.reshape(target.shape), scales, biases)
