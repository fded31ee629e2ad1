"""Sequences in chunks: what the recurrences that are computed in chunks share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx

# Tokens of a chunk: its products are of this size, and each chunk's state is kept for the gradient.
CHUNK = 64
# The logarithm of a gate that is 0 in float32; beyond it only the cumulative sums would suffer.
CLOSED = -104.0
MOST_PARTS = 10


def into_chunks(x: mx.array) -> mx.array:
    """(batch, T, H, D) -> (batch, H, chunks, size, D) float32, with zeros at the end.

    The size is ``CHUNK``, or a smaller power of 2 if T fits into it.
    """
    batch, tokens, heads, width = x.shape
    size = min(CHUNK, 1 << max(0, tokens - 1).bit_length())
    chunks = -(-tokens // size)
    x = x.astype(mx.float32).transpose(0, 2, 1, 3)
    x = mx.pad(x, [(0, 0), (0, 0), (0, chunks * size - tokens), (0, 0)])
    return x.reshape(batch, heads, chunks, size, width)


def each_chunk(*arrays: mx.array) -> Iterator[tuple[mx.array, ...]]:
    """The parts (batch, H, 1, …) of arrays (batch, H, chunks, …), one chunk after the other."""
    return zip(*(in_parts(x, 1, axis=2) for x in arrays), strict=True)


def in_parts(x: mx.array, size: int, axis: int) -> list[mx.array]:
    """x in parts of ``size`` along the axis; the last may be shorter.

    The gradient of a split is one concatenation; but into more than ``MOST_PARTS`` MLX splits by
    indexing, where the gradient of each part is an array as long as the whole.
    """
    length, step = x.shape[axis], size
    while step * MOST_PARTS < length:
        step *= MOST_PARTS
    parts = mx.split(x, list(range(step, length, step)), axis=axis)
    return parts if step == size else [p for part in parts for p in in_parts(part, size, axis)]


def decays(gate: mx.array) -> mx.array:
    """Γ_i / Γ_j for j ≤ i, and 0 elsewhere, (…, size, size), of log Γ (…, size, 1)."""
    lower = mx.tri(gate.shape[-2], dtype=mx.bool_)
    return mx.exp(mx.where(lower, gate - gate.swapaxes(-1, -2), -mx.inf))


@mx.custom_function
def linear_recurrence(gate: mx.array, added: mx.array) -> mx.array:
    """h_t = gate_t · h_{t−1} + added_t from h = 0, for arrays (batch, T, …).

    About √T blocks of √T tokens are computed side by side and then joined.
    """
    tokens = gate.shape[1]
    size = math.isqrt(tokens - 1) + 1
    blocks = -(-tokens // size)
    padding = [(0, 0), (0, blocks * size - tokens)] + [(0, 0)] * (gate.ndim - 2)
    gate, added = (mx.unflatten(mx.pad(z, padding), 1, (blocks, size)) for z in (gate, added))
    within, product = [added[:, :, 0]], [gate[:, :, 0]]
    for t in range(1, size):
        within.append(gate[:, :, t] * within[-1] + added[:, :, t])
        product.append(gate[:, :, t] * product[-1])
    before = [mx.zeros_like(within[-1][:, 0])]
    for n in range(blocks - 1):
        before.append(product[-1][:, n] * before[-1] + within[-1][:, n])
    earlier = mx.stack(before, axis=1)[:, :, None]
    states = mx.stack(within, axis=2) + mx.stack(product, axis=2) * earlier
    return states.flatten(1, 2)[:, :tokens]


@linear_recurrence.vjp
def _(primals: list[mx.array], cotangent: mx.array, states: mx.array) -> tuple[mx.array, mx.array]:
    gate, _ = primals
    # From the last token to the first: g_t = cotangent_t + gate_{t+1} · g_{t+1}.
    later = mx.concatenate([mx.zeros_like(gate[:, :1]), gate[:, :0:-1]], axis=1)
    gradient = linear_recurrence(later, cotangent[:, ::-1])[:, ::-1]
    previous = mx.concatenate([mx.zeros_like(states[:, :1]), states[:, :-1]], axis=1)
    return gradient * previous, gradient
