"""What the method reads: token ids, padded to one length."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Batch(NamedTuple):
    """Samples padded on the right to one length.

    Attributes:
        tokens: (batch, T) int32 token ids.
        counts: (batch, T) bool: which tokens count as targets: no prompt where it is masked, no
            padding, and never the first.
        lengths: (batch,) int32: how many tokens each sample has.
    """

    tokens: mx.array
    counts: mx.array
    lengths: mx.array
