"""Cross-entropy over the tokens that count: not padding, and not a masked prompt."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def masked_cross_entropy(
    logits: mx.array, tokens: mx.array, counts: mx.array
) -> tuple[mx.array, mx.array]:
    """Next-token cross-entropy, zero wherever the target is prompt or padding.

    Args:
        logits: (batch, T - 1 or T, vocabulary): the predictions after each token; the prediction
            after the last token, if present, is ignored.
        tokens: (batch, T) token ids, padded on the right with any ids.
        counts: (batch, T) bool: which tokens count as targets; the first never does.

    Returns:
        Losses (batch, T - 1) float32, zero where masked, and how many targets each sample has,
        (batch,) float32. Both are computed in float32 whatever the logits' dtype.
    """
    targets = tokens[:, 1:]
    counts = counts[:, 1:]
    losses = nn.losses.cross_entropy(logits[:, : targets.shape[1]].astype(mx.float32), targets)
    # where, not a product: a NaN at a masked position must not leak through 0 × NaN.
    losses = mx.where(counts, losses, 0.0)
    return losses, counts.sum(axis=1).astype(mx.float32)
