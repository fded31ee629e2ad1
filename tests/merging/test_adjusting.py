"""Scales and biases moved to the adapter's loss: the gradient, the step, and how far it goes."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tlora_mlx import load_base_model, target_linears
from tlora_mlx.data.batches import batches_in_order
from tlora_mlx.data.samples import Sample
from tlora_mlx.merging.adjusting import Direction, Slopes, adjusted, lowest, reaching
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
    total, found = slopes(model, {name: (target, levels, groups)}, batches)
    target.unfreeze()

    def loss(scales, biases):
        target.scales, target.biases = scales, biases
        return sum(summed_loss(model, batch.tokens, batch.counts)[0] for batch in batches)

    expected = mx.grad(loss, argnums=(0, 1))(values, -8 * values)
    assert total == pytest.approx(loss(values, -8 * values).item(), rel=1e-5)
    for one, other in zip(found[name], expected, strict=True):
        assert mx.allclose(one, other, rtol=1e-3, atol=1e-4 * mx.abs(other).max())
        assert mx.abs(other).max() > 1e-3


def test_the_step_is_newtons_for_a_group_alone():
    """One row of one group, where the quadratic form is 2 × 2; damping adds 1 to both factors."""
    random = np.random.default_rng(0)
    levels = random.integers(0, 16, (1, 32)).astype(np.float32)
    rounded = Grouped(levels, np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32))
    target = levels - random.normal(size=(1, 32)).astype(np.float32)
    root = random.normal(size=(32, 32)).astype(np.float32)
    inputs, outputs = root @ root.T, np.array([[3.0]], np.float32)
    by_weight = random.normal(size=(1, 32)).astype(np.float32)
    own = Slopes.of(rounded, target, GRID, Curvature(*map(mx.array, (inputs, outputs, by_weight))))
    mean = np.diag(inputs).mean()
    # O ⊗ I over the trace of O, where O / 3 + 1 = 2 by damping.
    fisher = 2 * (inputs / mean + np.eye(32)) * mean
    columns = np.stack([levels[0], np.ones(32)], axis=1)
    gradient = random.normal(size=2)
    expected = -np.linalg.solve(columns.T @ fisher @ columns, gradient)
    found = own.step(*(mx.full((1, 1), value) for value in gradient.tolist()))
    assert [part.item() for part in found] == pytest.approx(expected, rel=2e-2)
    wanted = [part.item() for part in own.wanted]
    assert own.along_error == pytest.approx((by_weight * (levels - target)).sum(), rel=1e-4)
    assert wanted == pytest.approx(columns.T @ by_weight[0], rel=1e-5)


@pytest.mark.parametrize("level", [0.0, 7.0])
def test_a_group_of_equal_levels(level):
    """Its scale has nothing of its own to change: the step stays small, and finite."""
    rounded = Grouped(np.full((2, 64), level, np.float32), *[np.ones((2, 2), np.float32)] * 2)
    factors = Curvature(mx.eye(64), mx.eye(2), mx.zeros((2, 64)))
    gradient = mx.array([[1.0, -2.0], [0.5, 1.0]])
    scales, biases = Slopes.of(rounded, rounded.levels, GRID, factors).step(
        level * gradient, gradient
    )
    change = scales * level + biases
    # The same change of the weights, whether by the scale or by the bias: −gradient / (2·2·32 / 2).
    assert mx.allclose(change, -gradient / 64, rtol=1e-2)


def test_the_lowest_point():
    calls = []

    def loss_at(fall):
        calls.append(fall)
        return 1 - fall + 2 * fall * fall

    assert lowest(1.0, loss_at) == pytest.approx(0.25)
    assert len(calls) == 2
    # Steeper than a parabola: the first guess is far too long, the next are better.
    steep = lowest(1.0, lambda fall: 1 - fall + 4 * fall**2 + 100 * fall**4)
    assert 0 < steep < 0.125
    # No bend to be seen: twice as far, and again.
    assert lowest(0.1, lambda fall: 0.1 - 1.1 * fall) == pytest.approx(0.4)


def test_reaching_the_goal():
    calls = []

    def loss_at(fall):
        calls.append(fall)
        return 1 - fall + fall * fall / 4

    assert loss_at(reaching(0.5, 1.0, loss_at)) == pytest.approx(0.5, abs=0.05)
    assert len(calls) <= 4


def test_no_step_that_harms():
    for loss in (5.0, float("nan")):
        assert lowest(1.0, lambda _, loss=loss: loss) == 0
        assert reaching(0.5, 1.0, lambda _, loss=loss: loss) == 0
    for none in (0.0, -1.0):  # nothing between the two models
        assert lowest(none, lambda _: -2.0) == 0


class _Quadratic:
    """A task whose loss is a parabola in one module's scales and biases, with a slope beside it.

    L(v) = adapted + c·(v − v*) + (v − v*)·H·(v − v*) / 2, H diagonal; it is checked by a line.
    """

    tokens, adapted, goal = 5, 3.0, 0.8

    def __init__(self, best, slope, bend):
        self.best, self.slope, self.bend = best, slope, bend

    def merge(self, weights, files):
        pass

    def place(self, weight, parts):
        self.at = np.stack([np.array(part, np.float64) for part in parts[1:]]) - self.best

    def calibration_loss(self):
        return self.adapted + (self.slope * self.at + self.bend * self.at**2 / 2).sum()

    def check_loss(self):
        return 1 + (self.slope * self.at).sum()

    def slopes(self, moved, files):
        (weight,) = moved.values()
        self.place(weight, weight.read(files))
        found = self.tokens * (self.slope + self.bend * self.at)
        return self.calibration_loss(), {"m": [mx.array(part, mx.float32) for part in found]}


@pytest.mark.parametrize("goal", [1.0, 0.8])
def test_back_to_the_adapted_weights_and_on_to_the_goal(goal):
    """Where the slope alone would lead elsewhere, and is more than the distance."""
    random = np.random.default_rng(4)
    shape = (2, 3, 2)  # scales and biases of three rows of two groups
    best, bend = random.normal(size=shape), random.uniform(0.5, 2, size=shape)
    before = best + random.normal(size=shape)
    slope = 1.2 * (before - best) + 0.3 * random.normal(size=shape)
    task = _Quadratic(best, slope, bend)
    task.goal = goal
    wanted = [mx.array(5 * part, mx.float32) for part in slope]
    curved = [mx.array(part, mx.float32) for part in bend]
    along_error = 5 * (slope * (before - best)).sum()
    own = Slopes(*curved, mx.zeros(shape[1:]), wanted, along_error)
    parts = [mx.zeros((3, 8), mx.uint32), *(mx.array(part, mx.float32) for part in before)]
    weights = {"m": SimpleNamespace(read=lambda files: parts)}
    found = adjusted(task, weights, {"m": own}, {})["m"]
    step = slope / bend
    expected = best - (1 - goal) / (slope * step).sum() * step
    assert np.abs(np.stack(found[1:]) - expected).max() < 0.02 * np.abs(before - best).max()
    assert found[0] is parts[0]
    assert along_error / 5 > (bend * (before - best) ** 2).sum() / 2


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_step_is_as_long_as_what_it_does(dtype):
    """In bfloat16 most changes are too small to be stored, and the step has to be longer."""
    random = np.random.default_rng(7)
    gradients, values = {}, {}
    direction = Direction(tokens=5)
    ones = mx.ones((64, 64))
    plainly = Slopes(ones, ones, mx.zeros((64, 64)), [], 0.0)  # a step against the gradient
    for name in ("a", "b"):
        gradients[name] = [mx.array(random.normal(size=(64, 64)), mx.float32) for _ in range(2)]
        values[name] = [mx.array(random.normal(size=(64, 64))).astype(dtype) for _ in range(2)]
        direction.add(name, gradients[name], plainly)
    after = direction.stepped(values, 1e-3)
    assert direction.fall(values, after) == pytest.approx(1e-3, rel=0.05)
    fall, length = 0.0, []
    for name, parts in after.items():
        for g, x, y in zip(gradients[name], values[name], parts, strict=True):
            assert y.dtype == dtype
            change = np.array(y.astype(mx.float32)) - np.array(x.astype(mx.float32))
            fall -= (np.array(g) * change).sum() / 5
            length.append(np.abs(change / np.array(g)).max())
    assert fall == pytest.approx(1e-3, rel=0.05)
    plain = 5e-3 / sum((g * g).sum().item() for parts in gradients.values() for g in parts)
    assert (max(length) > 10 * plain) == (dtype == mx.bfloat16)
    assert direction.stepped(values, 0.0) is values
    assert direction.stepped(values, float("nan")) is values
