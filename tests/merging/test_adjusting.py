"""Scales and biases moved to the adapter's loss: the gradient, the step, and how far it goes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tlora_mlx import load_base_model, target_linears
from tlora_mlx.data.batches import batches_in_order
from tlora_mlx.data.samples import Sample
from tlora_mlx.merging.adjusting import Stiffness, lowest, reaching
from tlora_mlx.merging.grid import Grid, Grouped
from tlora_mlx.method.curvature import Curvature, slopes
from tlora_mlx.method.layers import replace_modules
from tlora_mlx.method.output_layer import summed_loss

GRID = Grid({"mode": "affine", "bits": 4, "group_size": 32}, mx.float32)


class _OnItsGrid(nn.Module):
    """A linear layer without a bias that computes its weight from levels, scales and biases."""

    def __init__(self, levels, scales, biases):
        super().__init__()
        self._levels, self.scales, self.biases = levels, scales, biases

    def __call__(self, x):
        weight = self._levels.reshape(*self.scales.shape, -1) * self.scales[..., None]
        weight = weight + self.biases[..., None]
        return x @ weight.reshape(self._levels.shape).T


def test_slopes(model_path):
    """Against automatic differentiation, of three samples of different length in two batches."""
    model = load_base_model(str(model_path)).model
    samples = [Sample(list(range(3, 3 + n)), 2) for n in (7, 12, 9)]
    batches = list(batches_in_order(samples, 2, 64))
    name = "model.layers.0.mlp.down_proj"
    rows, groups = target_linears(model)[name].weight.shape[0], 5
    levels = mx.random.randint(0, 16, (rows, 16 * groups)).astype(mx.float32)
    values = 0.01 + 0.01 * mx.random.uniform(shape=(rows, groups))
    target = _OnItsGrid(levels, values, -8 * values)
    replace_modules(model, {name: target})
    found = slopes(model, {name: (target, levels, groups)}, batches)[name]
    target.unfreeze()

    def loss(scales, biases):
        target.scales, target.biases = scales, biases
        return sum(summed_loss(model, batch.tokens, batch.counts)[0] for batch in batches)

    expected = mx.grad(loss, argnums=(0, 1))(values, -8 * values)
    for one, other in zip(found, expected, strict=True):
        assert mx.allclose(one, other, rtol=1e-3, atol=1e-4 * mx.abs(other).max())
        assert mx.abs(other).max() > 1e-3


def test_the_step_is_newtons_for_a_group_alone():
    """One row of one group, where the quadratic form is 2 × 2; damping adds 1 to both factors."""
    random = np.random.default_rng(0)
    levels = random.integers(0, 16, (1, 32)).astype(np.float32)
    rounded = Grouped(levels, np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32))
    root = random.normal(size=(32, 32)).astype(np.float32)
    inputs, outputs = root @ root.T, np.array([[3.0]], np.float32)
    stiffness = Stiffness.of(rounded, GRID, Curvature(mx.array(inputs), mx.array(outputs)))
    mean = np.diag(inputs).mean()
    # O ⊗ I over the trace of O, where O / 3 + 1 = 2 by damping.
    fisher = 2 * (inputs / mean + np.eye(32)) * mean
    columns = np.stack([levels[0], np.ones(32)], axis=1)
    gradient = random.normal(size=2)
    expected = -np.linalg.solve(columns.T @ fisher @ columns, gradient)
    found = stiffness.step(*(mx.full((1, 1), value) for value in gradient.tolist()))
    assert [part.item() for part in found] == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("level", [0.0, 7.0])
def test_a_group_of_equal_levels(level):
    """Its scale has nothing of its own to change: the step stays small, and finite."""
    rounded = Grouped(np.full((2, 64), level, np.float32), *[np.ones((2, 2), np.float32)] * 2)
    factors = Curvature(mx.eye(64), mx.eye(2))
    gradient = mx.array([[1.0, -2.0], [0.5, 1.0]])
    scales, biases = Stiffness.of(rounded, GRID, factors).step(level * gradient, gradient)
    change = scales * level + biases
    # The same change of the weights, whether by the scale or by the bias: −gradient / (2·2·32 / 2).
    assert mx.allclose(change, -gradient / 64, rtol=1e-2)


def test_the_lowest_point():
    calls = []

    def loss_at(x):
        calls.append(x)
        return 1 - 2 * x + 4 * x * x

    assert lowest(1.0, -2.0, loss_at, 0.5) == pytest.approx(0.25)
    assert len(calls) == 2
    # Steeper than a parabola: the first guess is far too long, the next are better.
    steep = lowest(1.0, -2.0, lambda x: 1 - 2 * x + 4 * x * x + 100 * x**4, 1.0)
    assert 0 < steep < 0.25


@pytest.mark.parametrize("lost", [0.0, 0.3])
def test_reaching_the_goal(lost):
    """Also if a step of this length does nothing, as scales are rounded to their dtype."""
    calls = []

    def loss_at(x):
        calls.append(x)
        return 1 - max(x - lost, 0.0)

    assert reaching(0.5, 1.0, loss_at, 0.5) == pytest.approx(0.5 + lost)
    assert len(calls) <= 3


def test_no_step_that_harms():
    for loss in (5.0, float("nan")):
        assert lowest(1.0, -2.0, lambda _, loss=loss: loss, 0.5) == 0
        assert reaching(0.5, 1.0, lambda _, loss=loss: loss, 0.5) == 0
    assert lowest(1.0, 0.0, lambda x: 1 + x, 0.5) == 0
