"""Scales and biases moved once more, towards the adapted model and its loss.

First back: along the difference of the loss's gradients at the rounded and at the adapted model,
down to where the loss without its slope at the adapted model is least; that is how far apart the
two are, whatever the loss itself. Then on: while an adapter could still learn, the loss falls along
its deltas, so that the little that is lost of them costs as much of what was learnt. One step
against the gradient at the adapted model makes up for it, until the loss is the adapter's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from tlora_mlx.merging.conversion import StoredWeight
from tlora_mlx.merging.grid import Grid, Grouped
from tlora_mlx.merging.refitting import RIDGE, by_group
from tlora_mlx.method.curvature import Curvature
from tlora_mlx.storage.safetensors import TensorFile

if TYPE_CHECKING:  # it loads mlx-lm, which plain rounding does without
    from tlora_mlx.merging.task import AdaptedTask

# As a share of the factors' mean diagonals: the step goes far, so little is left to directions in
# which the samples happen to show no curvature.
DAMPING = 1.0
# The first length to try of the step back; each group's own curvature is a small part of what is
# between all of them, so the whole length is far too long.
FIRST = 0.1
TRIES = 3


class Stiffness(NamedTuple):
    """How much the loss curves along one module's scales and biases, each group for itself.

    Attributes:
        scales: (out, groups) float32, by a scale twice.
        biases: by a bias twice.
        both: by one of each.
    """

    scales: mx.array
    biases: mx.array
    both: mx.array

    @staticmethod
    def of(rounded: Grouped, grid: Grid, curvature: Curvature) -> Stiffness:
        """That of a rounded matrix.

        Raises:
            ValueError: the curvature cannot be used.
        """
        rows, columns = rounded.levels.shape
        (inputs, outputs), divisor = curvature.damped(DAMPING)
        levels = mx.array(rounded.levels).reshape(rows, columns // grid.group_size, -1)
        # The Fisher information is O ⊗ I divided by Σ_t |δ_t|², which is the trace of O.
        unit = divisor / mx.diagonal(curvature.outputs).sum().item()
        found = [unit * part for part in by_group(levels, inputs, outputs)]
        mx.eval(found)
        return Stiffness(*found)

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
    stiffness: dict[str, Stiffness],
    files: Mapping[str, TensorFile],
) -> dict[str, list[mx.array]]:
    """Merge the rounded weights, and move their scales and biases towards the adapted model.

    Args:
        task: with the adapter attached; on return its model is merged.
        weights: the adapted weights by name.
        stiffness: of those whose scales and biases move; it is emptied.
        files: the file of each stored tensor, by its name.

    Returns:
        The parts of the weights that have moved, in the file's order; empty if none has.

    Raises:
        RunError: the loss is not finite.
    """
    moved = {name: weights[name] for name in stiffness}
    if not moved:
        task.merge(weights, files)
        return {}
    wanted = task.slopes(moved, files)
    task.merge(weights, files)
    found = task.slopes(moved, files)
    back, on, slope, tilt, fall = {}, {}, 0.0, 0.0, 0.0
    for name in moved:
        stiff, to, at = stiffness.pop(name), wanted.pop(name), found.pop(name)
        back[name] = stiff.step(*(x - y for x, y in zip(at, to, strict=True)))
        on[name] = stiff.step(*to)
        mx.eval(back[name], on[name])
        tilt += _product(to, back[name]) / task.tokens
        slope += _product(at, back[name]) / task.tokens
        fall += _product(to, on[name]) / task.tokens

    def parts_at(backward: float, onward: float) -> dict[str, list[mx.array]]:
        parts = {}
        for name, weight in moved.items():
            levels, *values = weight.read(files)
            for i, steps in enumerate(zip(back[name], on[name], strict=True)):
                change = backward * steps[0] + onward * steps[1]
                values[i] = (values[i].astype(mx.float32) + change).astype(values[i].dtype)
            parts[name] = [levels, *values]
        return parts

    @cache
    def loss_at(backward: float, onward: float) -> float:
        for name, parts in parts_at(backward, onward).items():
            task.place(weights[name], parts)
        return task.calibration_loss()

    def tilted(length: float) -> float:
        return loss_at(length, 0.0) - length * tilt

    backward, onward = lowest(tilted(0.0), slope - tilt, tilted, FIRST), 0.0
    if (loss := loss_at(backward, 0.0)) > task.goal and fall < 0:
        guess = (task.goal - loss) / fall
        onward = reaching(task.goal, loss, partial(loss_at, backward), guess)
    return parts_at(backward, onward) if backward or onward else {}


def _product(gradients: Sequence[mx.array], steps: Sequence[mx.array]) -> float:
    """The derivative of the loss along a step."""
    return sum((g * s).sum().item() for g, s in zip(gradients, steps, strict=True))


def lowest(loss: float, slope: float, loss_at: Callable[[float], float], length: float) -> float:
    """How far to go along a step for the lowest loss: where parabolas have their lowest points.

    Args:
        loss: at the start.
        slope: its derivative by the length there.
        loss_at: computes the loss.
        length: the first guess.

    Returns:
        The best of the lengths tried, or 0.
    """
    tried = {0.0: loss}
    for _ in range(TRIES):
        tried[length] = loss_at(length)
        bend = (tried[length] - loss - slope * length) / length**2
        if not (slope < 0 < bend):
            break
        length = -slope / (2 * bend)
        if length in tried:
            break
    return min(tried, key=lambda x: tried[x] if tried[x] <= loss else math.inf)


def reaching(goal: float, loss: float, loss_at: Callable[[float], float], length: float) -> float:
    """How far to go along a step until the loss has fallen to ``goal``.

    Small steps may do less than the slope says, since scales are rounded to their dtype: after the
    first guess twice as far, and from a try that is beyond the goal back to where it should be.

    Args:
        goal: a lower loss.
        loss: at the start.
        loss_at: computes the loss.
        length: the first guess.

    Returns:
        The length of those tried whose loss is closest to the goal, and not above ``loss``; or 0.
    """
    tried = {0.0: loss}
    for _ in range(TRIES):
        before = min(tried.values())
        tried[length] = loss_at(length)
        if beyond := [x for x in tried if tried[x] < goal]:
            right = min(beyond)
            left = max(x for x in tried if x < right)
            share = (tried[left] - goal) / (tried[left] - tried[right])
            length = left + share * (right - left)
        elif tried[length] < before:
            length *= 2
        else:
            break
    lower = [x for x in tried if tried[x] <= loss]
    return min(lower, key=lambda x: abs(tried[x] - goal))
