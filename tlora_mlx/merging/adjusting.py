"""Scales and biases moved once more, until the loss is what it was with the adapter.

What rounding leaves of an error is small in the metric of the loss, but while the adapter could
still learn, the loss falls along its deltas, so that losing a tenth of them costs a tenth of what
was learnt. One step of gradient descent on the rounded model's scales and biases makes up for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
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
    stiffness: Mapping[str, Stiffness],
    files: Mapping[str, TensorFile],
) -> dict[str, list[mx.array]]:
    """One step of scales and biases from the merged model to the adapter's loss.

    Args:
        task: merged (``AdaptedTask.merge``); its model is changed.
        weights: the weights by name.
        stiffness: of those whose scales and biases move.
        files: the file of each stored tensor, by its name.

    Returns:
        The parts of those weights, in the file's order; empty if there is nothing to gain.

    Raises:
        RunError: the loss is not finite.
    """
    moved = {name: weights[name] for name in stiffness}
    loss, goal = task.calibration_loss(), task.goal
    if not (moved and loss > goal):
        return {}
    gradients = task.slopes(moved, files)
    steps = {name: stiffness[name].step(*gradients[name]) for name in moved}
    slope = sum(
        (gradient * step).sum().item()
        for name in moved
        for gradient, step in zip(gradients.pop(name), steps[name], strict=True)
    )

    def at(length: float) -> dict[str, list[mx.array]]:
        found = {}
        for name, weight in moved.items():
            levels, *others = weight.read(files)
            found[name] = [levels, *map(partial(_moved, length), others, steps[name])]
        return found

    def loss_at(length: float) -> float:
        for name, parts in at(length).items():
            task.place(weights[name], parts)
        return task.calibration_loss()

    length = length_to(goal, loss, slope, loss_at)
    return at(length) if length else {}


def _moved(length: float, values: mx.array, step: mx.array) -> mx.array:
    """Scales or biases some way along their step, rounded to their dtype."""
    return (values.astype(mx.float32) + length * step).astype(values.dtype)


def length_to(goal: float, loss: float, slope: float, loss_at: Callable[[float], float]) -> float:
    """How far to go along a step until the loss has fallen to ``goal``, or as far as it falls.

    The first guess is by the slope, the second by the parabola through the first; the one closer to
    the goal is taken, if the loss is lower there than at the start.

    Args:
        goal: a lower loss.
        loss: at the start.
        slope: its derivative by the length.
        loss_at: computes the loss.
    """
    tried = {0.0: loss}
    length = (goal - loss) / slope if slope < 0 else 0.0
    for _ in range(2):
        if length in tried or not math.isfinite(length):
            break
        tried[length] = loss_at(length)
        bend = (tried[length] - loss - slope * length) / length**2
        if not bend > 0:
            break
        beyond = slope**2 - 4 * bend * (loss - goal)
        length = (-slope - math.sqrt(max(beyond, 0.0))) / (2 * bend)
    lower = [length for length in tried if tried[length] <= loss]
    return min(lower, key=lambda length: abs(tried[length] - goal))
