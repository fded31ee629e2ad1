"""The method's input: token ids, padded to one length."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Batch(NamedTuple):
    """Samples padded on the right to one length.

    Attributes:
        tokens: (batch, T) int32 token ids.
        counts: (batch, T) bool: which tokens count as targets: not a masked prompt, not padding,
            and never the first token.
        lengths: (batch,) int32: each sample's number of tokens.
    """

    tokens: mx.array
    counts: mx.array
    lengths: mx.array
