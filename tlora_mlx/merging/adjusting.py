"""Scales and biases moved once more, towards the adapted model and its loss.

First back: along the difference of the loss's gradients at the rounded and at the adapted model,
down to where the loss without its slope at the adapted model is least; that is how far apart the
two are, whatever the loss itself. Then on: while an adapter could still learn, the loss falls along
its deltas, so that the little that is lost of them costs as much of what was learnt. One step
against the gradient at the adapted model makes up for it, until the loss is the adapter's on other
samples than those of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from tlora_mlx.merging.conversion import StoredWeight
from tlora_mlx.merging.grid import Grid, Grouped
from tlora_mlx.merging.refitting import RIDGE, by_group
from tlora_mlx.method.curvature import Curvature, by_scales_and_biases
from tlora_mlx.storage.safetensors import TensorFile

if TYPE_CHECKING:  # it loads mlx-lm, which plain rounding does without
    from tlora_mlx.merging.task import AdaptedTask

# As a share of the factors' mean diagonals: the step goes far, so little is left to directions in
# which the samples happen to show no curvature.
DAMPING = 1.0
# How often the loss is measured for each of the two steps, at most.
TRIES = 3
# A step that is so near to the best one, or a loss that is so near to the goal, is good enough.
NEAR = 0.03
# How a step of a given effect is found: twice as far, so often at most, then between the last two.
DOUBLINGS, HALVINGS = 30, 8


class Slopes(NamedTuple):
    """The loss along one module's scales and biases, each group for itself: (out, groups) float32.

    Attributes:
        scales: its second derivative by a scale.
        biases: by a bias.
        both: by one of each.
        wanted: the gradients by scales and by biases that the adapted model has.
        along_error: what its gradient, times the error of rounding, adds to the summed loss.
    """

    scales: mx.array
    biases: mx.array
    both: mx.array
    wanted: list[mx.array]
    along_error: float

    @staticmethod
    def of(rounded: Grouped, target: np.ndarray, grid: Grid, curvature: Curvature) -> Slopes:
        """At a matrix that was rounded from ``target``, both (out, in).

        Raises:
            ValueError: the curvature cannot be used.
        """
        rows, columns = rounded.levels.shape
        inputs, outputs, divisor = curvature.damped(DAMPING)
        levels = mx.array(rounded.levels).reshape(rows, columns // grid.group_size, -1)
        # The Fisher information is O ⊗ I divided by Σ_t |δ_t|², which is the trace of O.
        unit = divisor / mx.diagonal(curvature.outputs).sum().item()
        found = [unit * part for part in by_group(levels, inputs, outputs)]
        wanted = by_scales_and_biases(curvature.gradient, levels, levels.shape[1])
        along_error = (curvature.gradient * mx.array(rounded.dense() - target)).sum(-1).sum()
        mx.eval(found, wanted, along_error)
        return Slopes(*found, wanted, along_error.item())

    def step(self, by_scales: mx.array, by_biases: mx.array) -> list[mx.array]:
        """Where the loss falls most for what its curvature grows: changes of scales and biases.

        Args:
            by_scales: the loss's gradient by them, (out, groups).
            by_biases: the same.
        """
        # With the bias that is best for a scale eliminated; a group of equal levels has no scale.
        level = self.both / self.biases
        ridge = RIDGE * (self.scales + self.biases)
        scales = (level * by_biases - by_scales) / (self.scales - level * self.both + ridge)
        return [scales, -by_biases / self.biases - level * scales]


def adjusted(
    task: AdaptedTask,
    weights: Mapping[str, StoredWeight],
    slopes: dict[str, Slopes],
    files: Mapping[str, TensorFile],
) -> dict[str, list[mx.array]]:
    """Merge the rounded weights, and move their scales and biases towards the adapted model.

    Args:
        task: with the adapter attached; on return its model is merged.
        weights: the adapted weights by name.
        slopes: of those whose scales and biases move; it is emptied.
        files: the file of each stored tensor, by its name.

    Returns:
        The parts of those weights as they are now to be stored, in the file's order.

    Raises:
        RunError: the loss is not finite.
    """
    task.merge(weights, files)
    moved = {name: weights[name] for name in slopes}
    if not moved:
        return {}
    rounded, found = task.slopes(moved, files)
    back, on = Direction(task.tokens), Direction(task.tokens)
    start, along_error = {}, 0.0
    for name, weight in moved.items():
        own, at = slopes.pop(name), found.pop(name)
        start[name] = weight.read(files)[1:]
        apart = [x - y for x, y in zip(at, own.wanted, strict=True)]
        mx.eval(apart)
        back.add(name, apart, own)
        on.add(name, own.wanted, own)
        along_error += own.along_error / task.tokens

    def place(values: Values) -> None:
        for name, weight in moved.items():
            task.place(weight, [weight.read(files)[0], *values[name]])

    def distance_at(fall: float) -> float:
        values = back.stepped(start, fall)
        place(values)
        return task.calibration_loss() - task.adapted - along_error + on.fall(start, values)

    def loss_at(fall: float) -> float:
        place(on.stepped(nearer, fall))
        return task.check_loss()

    nearer = back.stepped(start, lowest(rounded - task.adapted - along_error, distance_at))
    values, loss = nearer, loss_at(0.0)
    if loss > task.goal:
        values = on.stepped(nearer, reaching(task.goal, loss, loss_at))
    return {name: [weight.read(files)[0], *values[name]] for name, weight in moved.items()}


# Scales and biases, (out, groups) as they are stored, by module.
Values = Mapping[str, Sequence[mx.array]]


class Direction:
    """A step of all scales and biases, whose length is measured by what it does to the loss.

    Where scales are stored in few bits, changes that are too small for them are lost: a step of
    half the length may do a tenth or nothing, so lengths themselves say little.

    Args:
        tokens: over how many the gradients are summed.
    """

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._modules: dict[str, tuple[Sequence[mx.array], Slopes]] = {}

    def add(self, name: str, gradients: Sequence[mx.array], own: Slopes) -> None:
        """Add a module: the loss's gradients, and the curvature by which they make a step."""
        self._modules[name] = gradients, own

    def fall(self, before: Values, after: Values) -> float:
        """By how much the loss falls between two values, to first order."""
        summed = 0.0
        for name, (gradients, _) in self._modules.items():
            for g, x, y in zip(gradients, before[name], after[name], strict=True):
                summed += (g * (x.astype(mx.float32) - y.astype(mx.float32))).sum().item()
        return summed / self._tokens

    def stepped(self, values: Values, fall: float) -> Values:
        """The values after the step with which the loss falls, to first order, by ``fall``.

        Those given if it cannot.
        """
        at = partial(self._at, values)
        slope = sum(
            (g * step).sum().item() / self._tokens
            for gradients, own in self._modules.values()
            for g, step in zip(gradients, own.step(*gradients), strict=True)
        )
        if not (fall > 0 > slope):
            return values
        short, long = 0.0, fall / -slope
        for _ in range(DOUBLINGS):
            if self.fall(values, at(long)) >= fall:
                break
            short, long = long, 2 * long
        for _ in range(HALVINGS):
            middle = (short + long) / 2
            if self.fall(values, at(middle)) < fall:
                short = middle
            else:
                long = middle
        return at(long)

    def _at(self, values: Values, length: float) -> Values:
        """After a step of so many times its length; not evaluated."""
        return {
            name: [
                (x.astype(mx.float32) + length * step).astype(x.dtype)
                for x, step in zip(values[name], own.step(*gradients), strict=True)
            ]
            for name, (gradients, own) in self._modules.items()
        }


def lowest(loss: float, loss_at: Callable[[float], float]) -> float:
    """How far to go for the lowest loss: where parabolas have their lowest points.

    Args:
        loss: at the start.
        loss_at: computes the loss after a step, by how much it would fall to first order.

    Returns:
        The best of the steps tried, or 0.
    """
    tried, fall = {0.0: loss}, loss
    for _ in range(TRIES):
        if not fall > 0:
            break
        tried[fall] = loss_at(fall)
        bend = (tried[fall] - loss + fall) / fall**2
        before, fall = fall, 1 / (2 * bend) if bend > 0 else 2 * fall
        if not abs(fall / before - 1) > NEAR:
            break
    return min(tried, key=lambda x: tried[x] if tried[x] <= loss else math.inf)


def reaching(goal: float, loss: float, loss_at: Callable[[float], float]) -> float:
    """How far to go until the loss has fallen to ``goal``.

    Args:
        goal: a lower loss.
        loss: at the start.
        loss_at: computes the loss after a step, by how much it would fall to first order.

    Returns:
        The step of those tried whose loss is closest to the goal, and not above ``loss``; or 0.
    """
    tried, fall = {0.0: loss}, loss - goal
    for _ in range(TRIES):
        tried[fall] = loss_at(fall)
        if not abs(tried[fall] - goal) > NEAR * (loss - goal) or not tried[fall] < loss:
            break
        fall *= (loss - goal) / (loss - tried[fall])
    lower = [x for x in tried if tried[x] <= loss]
    return min(lower, key=lambda x: abs(tried[x] - goal))
