"""Sequences in chunks: what the recurrences that are computed in chunks share."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

# Tokens of a chunk: its products are of this size, and each chunk's state is kept for the gradient.
CHUNK = 64
# The logarithm of a gate that is 0 in float32; beyond it only the cumulative sums would suffer.
CLOSED = -104.0


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
    """The parts (batch, H, 1, …) of arrays (batch, H, chunks, …), one chunk after the other.

    The gradient of a split is one concatenation, that of an index an array as long as the whole.
    """
    return zip(*(mx.split(x, x.shape[2], axis=2) for x in arrays), strict=True)


def decays(gate: mx.array) -> mx.array:
    """Γ_i / Γ_j for j ≤ i, and 0 elsewhere, (…, size, size), of log Γ (…, size, 1)."""
    lower = mx.tri(gate.shape[-2], dtype=mx.bool_)
    return mx.exp(mx.where(lower, gate - gate.swapaxes(-1, -2), -mx.inf))
