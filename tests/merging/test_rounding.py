"""Rounding row by row and column by column, compared with its definition."""

import mlx.core as mx
import numpy as np
import pytest

from tlora_mlx.merging import rounding
from tlora_mlx.merging.grid import Grid

SETTINGS = {"mode": "affine", "bits": 3, "group_size": 32}


def metric(random, size):
    """A positive definite matrix, (size, size), far from diagonal."""
    mixed = random.normal(size=(size, size)) + 2
    return (mixed @ mixed.T / size + 0.3 * np.eye(size)).astype(np.float32)


def unit_upper(matrix):
    """U, with ones on its diagonal, of matrix = U·D·Uᵀ."""
    upper = np.linalg.inv(np.linalg.cholesky(np.linalg.inv(matrix.astype(np.double)))).T
    return upper / np.diag(upper)


def defined(target, start, grid, inputs, outputs):
    """The levels, entry by entry; four rows at once do not make up for each other's errors."""
    by_row, by_column = (np.argsort(-np.diag(m), kind="stable") for m in (outputs, inputs))
    down = unit_upper(outputs[np.ix_(by_row, by_row)])
    along = unit_upper(inputs[np.ix_(by_column, by_column)])
    groups = by_column // grid.group_size
    levels, errors = np.zeros(target.shape), np.zeros(target.shape)
    for first in range(0, len(target), 4):
        block = slice(first, first + 4)
        # What brings this block's rows of downᵀ·errors to zero, given those before it.
        asked = np.linalg.solve(down[block, block].T, down[:first, block].T @ errors[:first])
        for i, row in enumerate(by_row[block]):
            wanted = target[row, by_column] + asked[i]
            made = np.zeros(len(wanted))
            for j, (column, group) in enumerate(zip(by_column, groups, strict=True)):
                scale, bias = start.scales[row, group], start.biases[row, group]
                shifted = wanted[j] + made[:j] @ along[:j, j]
                levels[row, column] = grid.nearest(np.array((shifted - bias) / scale))
                made[j] = wanted[j] - levels[row, column] * scale - bias
            errors[first + i] = made - asked[i]
    return levels


@pytest.mark.parametrize("panel", [8, 256])
def test_compensated_is_its_definition(panel, monkeypatch):
    """With rows and columns that are no multiple of a tile, in several panels and in one."""
    monkeypatch.setattr(rounding, "PANEL", panel)
    random = np.random.default_rng(0)
    shape = 11, 96
    grid = Grid(SETTINGS, mx.float32)
    weight = mx.array(random.normal(size=shape).astype(np.float32))
    start = grid.take_apart(mx.quantize(weight, **SETTINGS))
    target = np.array(weight)
    problem = target, start, grid, metric(random, shape[1]), metric(random, shape[0])
    found, expected = rounding.compensated(*problem).levels, defined(*problem)
    assert (expected != start.levels).mean() > 0.1  # nearest
    assert (found != expected).mean() < 0.02  # a tie in float32 changes what follows


def test_levels_stay_within_the_grid():
    grid = Grid(SETTINGS, mx.float32)
    assert grid.nearest(np.array([-3.2, -0.4, 0.6, 7.4, 99])).tolist() == [0, 0, 1, 7, 7]


def test_a_group_whose_scale_is_zero():
    """Whatever its levels, it stands for its bias; the other group goes on as without it."""
    random = np.random.default_rng(0)
    grid = Grid(SETTINGS, mx.float32)
    start = grid.take_apart(mx.quantize(mx.array(random.normal(size=(4, 64))), **SETTINGS))
    start.scales[:, 1] = 0
    found = rounding.compensated(start.dense(), start, grid, metric(random, 64), metric(random, 4))
    assert np.array_equal(found.levels[:, :32], start.levels[:, :32])
    assert np.array_equal(found.dense(), start.dense())
    assert np.isin(found.levels, range(8)).all()
