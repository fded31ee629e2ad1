"""Gram matrices Xᵀ X as strips: symmetric, so what is left of the diagonal is not computed.

Strip i has some of the matrix's rows, from the diagonal to the right. With four strips that is five
eighths of the operations and of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx

STRIPS = 4


def _edges(width: int) -> list[int]:
    """Where the strips of a (width, width) matrix begin, and where the last ends."""
    return sorted({width * i // STRIPS for i in range(STRIPS + 1)})


def zero_strips(width: int) -> list[mx.array]:
    """The strips of a (width, width) matrix of zeros, which take no memory."""
    zero = mx.array(0.0)
    return [
        mx.broadcast_to(zero, (after - first, width - first))
        for first, after in pairwise(_edges(width))
    ]


def gram_strips(x: mx.array) -> list[mx.array]:
    """The strips of Xᵀ X, of X (N, width)."""
    edges = _edges(x.shape[1])
    return [x[:, first:after].T @ x[:, first:] for first, after in pairwise(edges)]


def from_strips(strips: Sequence[mx.array]) -> mx.array:
    """The whole matrix of which these are the strips, (width, width); it is not evaluated."""
    edges = _edges(strips[0].shape[1])
    rows = []
    for i, strip in enumerate(strips):
        above = zip(edges, strips[:i], strict=False)
        left = [s[:, edges[i] - first : edges[i + 1] - first].T for first, s in above]
        rows.append(mx.concatenate([*left, strip], axis=1))
    return mx.concatenate(rows)


def unit_of(gram: mx.array) -> mx.array:
    """The largest absolute entry of Xᵀ X, or of a sum of such; 1 if all are 0.

    It is on the diagonal. Products with the matrix are divided by it, so that large activations
    cannot overflow float32; to divide the matrix itself would take as much memory again.
    """
    largest = mx.diag(gram).max()
    return mx.where(largest == 0, 1.0, largest)
