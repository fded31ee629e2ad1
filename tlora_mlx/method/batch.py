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
