"""How much of W·C a task subspace captures, in all and behind its leading directions.

In real models one direction, or a few, can be nearly all of W·C: then every A captures 99.9 % in
all, and only what it captures of the rest shows how good it is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

from tlora_mlx.method import linalg
from tlora_mlx.method.symmetric import unit_of

# Number of random vectors for estimating the energy outside a subspace.
PROBES = 64
# Directions lead if the next singular value is smaller than their last by this factor.
GAP = 10
# Singular values below this share of the largest are float32's rounding errors.
ROUNDING = 1e-6


class CapturedEnergy(NamedTuple):
    """The shares of ‖W·C‖² (Frobenius) that lie in the span of A's rows, between 0 and 1.

    Attributes:
        total: of all energy.
        beyond: of the energy without that of the leading directions; None if unknown.
        leading: the number of leading directions: those before the widest gap between the
            singular values of W·C·Aᵀ, where it is at least a factor of ``GAP``. Often 0.
    """

    total: float
    beyond: float | None = None
    leading: int = 0


def captured_energy(
    weight: mx.array, covariance: mx.array, a: mx.array, seed: int = 0
) -> CapturedEnergy:
    """The shares of the energy of W·C that A captures.

    W·C is not formed: the energy inside is ‖W·C·Aᵀ‖², and the energy outside is estimated without
    bias with random vectors g, as the mean of ‖(1 − AᵀA)·C·Wᵀ·g‖².

    Args:
        weight: W (out, in) float32.
        covariance: C (in, in) float32. Its scale does not matter.
        a: (rank, in) with orthonormal rows.
        seed: of the random vectors.
    """
    unit = unit_of(covariance)
    image = weight @ (covariance @ (a.T / unit))
    random = mx.random.normal((weight.shape[0], PROBES), key=mx.random.key(seed))
    rest = covariance @ (weight.T @ random / unit)
    outside = mx.square(rest - a.T @ (a @ rest)).sum() / PROBES
    mx.eval(image, outside)
    values = linalg.svd(image)[1].tolist()
    leading = _leading(values)

    def share(inside: float) -> float:
        return inside / max(inside + outside.item(), 1e-30)

    total, beyond = (sum(s**2 for s in values[first:]) for first in (0, leading))
    return CapturedEnergy(share(total), share(beyond), leading)


def _leading(values: list[float]) -> int:
    """How many singular values, of these in descending order, come before a gap that counts."""
    gaps = {
        count: before / after
        for count, (before, after) in enumerate(pairwise(values), 1)
        if after > ROUNDING * values[0]
    }
    widest = max(gaps, key=gaps.__getitem__, default=0)
    return widest if gaps.get(widest, 0) >= GAP else 0
