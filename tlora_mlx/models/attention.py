"""Causal attention in chunks of queries: the scores above the diagonal are hardly computed.

Under gradients MLX computes and keeps every score, on a GPU too, and masks half of them.
"""

from __future__ import annotations

import mlx.core as mx

from tlora_mlx.models.chunks import in_parts

# Queries of a chunk, at least, and chunks, at most: each is some ten operations.
CHUNK = 128
MOST_CHUNKS = 8


def causal_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: object,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's ``models/base.py``: ``scaled_dot_product_attention``, without a quantized cache.

    Args:
        queries: (batch, heads, T, D).
        keys: (batch, key heads, T, D).
        values: (batch, key heads, T, V).
        cache: not used; there is none while a model is differentiated.
        scale: of the products of queries and keys.
        mask: "causal", or an array, with which everything is computed at once.
        sinks: (heads,): a further score for each head.

    Returns:
        (batch, heads, T, V).
    """

    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )

    tokens = queries.shape[2]
    chunks = min(-(-tokens // CHUNK), MOST_CHUNKS)
    is_causal = isinstance(mask, str) and mask == "causal" and keys.shape[2] == tokens
    if not is_causal or chunks == 1:
        return attend(queries, keys, values)
    attended, stop = [], 0
    for chunk in in_parts(queries, -(-tokens // chunks), axis=2):
        stop += chunk.shape[2]
        # MLX takes fewer queries than keys for the last ones.
        attended.append(attend(chunk, keys[:, :, :stop], values[:, :, :stop]))
    return mx.concatenate(attended, axis=2)
