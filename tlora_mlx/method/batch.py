"""What the method reads: token ids, padded to one length."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Batch(NamedTuple):
    """Samples padded on the right to one length.

    Attributes:
        tokens: (batch, T) int32 token ids.
        spans: (batch, 2) int32: the first position that counts as a target (after the prompt, where
            it is masked), and the sample's length.
    """

    tokens: mx.array
    spans: mx.array


def counted_positions(tokens: mx.array, spans: mx.array) -> mx.array:
    """Which of the targets ``tokens[:, 1:]`` count in the loss: no prompt, no padding.

    Args:
        tokens: (batch, T) token ids.
        spans: as in ``Batch``.

    Returns:
        (batch, T - 1) bool. Position 0 is never a target.
    """
    positions = mx.arange(1, tokens.shape[1])
    return (positions >= spans[:, 0:1]) & (positions < spans[:, 1:2])
