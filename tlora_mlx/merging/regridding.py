"""Scales and biases for another number of bits: W's own made finer, or a narrowed range."""

from __future__ import annotations

import numpy as np

from tlora_mlx.merging.grid import Grid, Grouped

# How much narrower than a group's extremes the levels may lie: few bits serve many weights better
# if the outermost ones are cut.
SHARES = np.linspace(1.0, 0.4, 13)


def made_finer(target: np.ndarray, start: Grouped, grid: Grid, onto: Grid) -> Grouped:
    """The levels nearest to a matrix, on a grid among whose levels are all those of another.

    Args:
        target: W (out, in) float32.
        start: with the scales and biases of ``grid``.
        grid: affine.
        onto: the same with no fewer bits.
    """
    scales = onto.stored(start.scales / 2 ** (onto.bits - grid.bits))
    return _nearest(target, scales, start.biases, onto)


def narrowed(target: np.ndarray, onto: Grid, importance: np.ndarray) -> Grouped:
    """The levels nearest to a matrix within each group's best range: of its own, and narrower ones.

    That with the least Σ_j importance_j (Q − W)_ij².

    Args:
        target: W (out, in) float32.
        onto: affine.
        importance: of each column, (in,) float32.
    """
    values = target.reshape(len(target), -1, onto.group_size)
    low, high = values.min(-1), values.max(-1)
    best, least = None, np.full(low.shape, np.inf, np.float32)
    for share in SHARES:
        middle, half = (low + high) / 2, share * (high - low) / 2
        scales = onto.stored(2 * half / (2**onto.bits - 1))
        found = _nearest(target, scales, onto.stored(middle - half), onto)
        errors = importance * (found.dense() - target) ** 2
        errors = errors.reshape(values.shape).sum(-1)
        better = errors < least
        best, least = _where(better, found, best or found), np.where(better, errors, least)
    return best


def _nearest(target: np.ndarray, scales: np.ndarray, biases: np.ndarray, onto: Grid) -> Grouped:
    values = target.reshape(*scales.shape, -1)
    steps = np.where(scales == 0, 1, scales)[..., None]
    levels = onto.nearest((values - biases[..., None]) / steps)
    return Grouped(levels.reshape(target.shape), scales, biases)


def _where(groups: np.ndarray, one: Grouped, other: Grouped) -> Grouped:
    """Some groups of one matrix, the rest of the other."""
    entries = np.repeat(groups, one.levels.shape[1] // groups.shape[1], axis=1)
    which = entries, groups, groups
    return Grouped(*map(np.where, which, one, other))
