"""The scales and biases that serve given levels best: least squares in the metric of the loss."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tlora_mlx.merging.grid import Grid, Grouped

# After so many iterations, up to a number of times, what would be stored is compared with what was
# best: where scales are coarse (bfloat16), rounding them soon costs more than fitting gains.
ITERATIONS, ROUNDS = 6, 7
LEAST_GAIN = 0.01
# A share of each unknown's own curvature, which keeps it near where it was.
RIDGE = 1e-3


def refitted(
    target: np.ndarray, found: Grouped, grid: Grid, inputs: mx.array, outputs: mx.array
) -> Grouped:
    """Change scales and biases so that tr(O·E·I·Eᵀ) is least, for E = Q − W and fixed levels.

    Q is linear in them, so this is a linear system, of all rows together since O mixes them; it is
    solved by conjugate gradients, preconditioned by its diagonal, until the result, rounded to the
    dtype in which scales are stored, is hardly better than before.

    Args:
        target: W (out, in) float32.
        found: the levels, and the scales and biases to start from.
        grid: how they are stored; affine.
        inputs: I (in, in) float32, positive definite.
        outputs: O (out, out) float32, positive definite.

    Returns:
        The best that was found, or what it started from.
    """
    rows, columns = target.shape
    size = grid.group_size
    groups = columns // size
    levels = mx.array(found.levels).reshape(rows, groups, size)

    def change(unknowns: list[mx.array]) -> mx.array:
        """Of Q, (out, in), for changes of scales and biases (out, groups)."""
        scales, biases = (part[..., None] for part in unknowns)
        return (levels * scales + biases).reshape(rows, columns)

    def gradient(error: mx.array) -> list[mx.array]:
        """By scales and biases, of half the metric at an error (out, in)."""
        by_entry = (outputs @ error @ inputs).reshape(rows, groups, size)
        return [(by_entry * levels).sum(-1), by_entry.sum(-1)]

    diagonal = by_group(levels, inputs, outputs)[:2]
    floor = 1e-6 * mx.maximum(diagonal[0].max(), diagonal[1].max())
    diagonal = [part + floor for part in diagonal]

    def product(a: list[mx.array], b: list[mx.array]) -> mx.array:
        return sum((x * y).sum(-1).sum() for x, y in zip(a, b, strict=True))

    residual = gradient(mx.array(target - found.dense()))
    solution = [mx.zeros((rows, groups))] * 2
    scaled = [r / d for r, d in zip(residual, diagonal, strict=True)]
    direction, energy = scaled, product(residual, scaled)
    first, best = energy.item(), found
    least = weighted_error(found.dense() - target, inputs, outputs)
    for _ in range(ROUNDS):
        for _ in range(ITERATIONS):
            if not energy.item() > 1e-10 * first:
                break
            image = gradient(change(direction))
            image = [q + RIDGE * d * p for q, d, p in zip(image, diagonal, direction, strict=True)]
            step = energy / product(direction, image)
            solution = [x + step * p for x, p in zip(solution, direction, strict=True)]
            residual = [r - step * q for r, q in zip(residual, image, strict=True)]
            scaled = [r / d for r, d in zip(residual, diagonal, strict=True)]
            before, energy = energy, product(residual, scaled)
            direction = [z + energy / before * p for z, p in zip(scaled, direction, strict=True)]
            mx.eval(solution, residual, direction, energy)
        scales, biases = map(np.array, solution)
        stored = found._replace(
            scales=grid.stored(found.scales + scales), biases=grid.stored(found.biases + biases)
        )
        error, before = weighted_error(stored.dense() - target, inputs, outputs), least
        if error < least:
            best, least = stored, error
        if error > (1 - LEAST_GAIN) * before:
            break
    return best


def by_group(
    levels: mx.array, inputs: mx.array, outputs: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """tr(O·E·I·Eᵀ) as a form in the scale and the bias of one group, for each group alone.

    Args:
        levels: (out, groups, size) float32.
        inputs: I (in, in) float32.
        outputs: O (out, out) float32.

    Returns:
        The coefficients (out, groups) of scale², of bias² and, halved, of scale · bias.
    """
    groups, size = levels.shape[1:]
    own = mx.diagonal(inputs.reshape(groups, size, groups, size), axis1=0, axis2=2)
    own = own.transpose(2, 0, 1)  # (groups, size, size)
    weights = mx.diagonal(outputs)[:, None]
    by_level = (levels.transpose(1, 0, 2) @ own).transpose(1, 0, 2)
    return (
        (by_level * levels).sum(-1) * weights,
        own.sum((1, 2))[None] * weights,
        by_level.sum(-1) * weights,
    )


def weighted_error(error: np.ndarray, inputs: mx.array, outputs: mx.array) -> float:
    """tr(O·E·I·Eᵀ) of an error E (out, in)."""
    matrix = mx.array(error)
    return ((outputs @ matrix @ inputs) * matrix).sum(-1).sum().item()
