"""The peak memory of work on a batch, without running what would not fit.

A batch is come to by growing parts, each of them only if the ones before let expect that it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
from rich.filesize import decimal

from tlora_mlx.data.samples import Sample

# No shorter part of a row is tried by itself.
SHORTEST_PART = 64


class Peak(NamedTuple):
    """The most memory in use during a piece of work, in bytes, the model included.

    Attributes:
        bytes: how much.
        measured: False if it was extrapolated from smaller parts, since it would not have fitted.
    """

    bytes: int
    measured: bool

    def described(self) -> str:
        """In words."""
        return f"{'' if self.measured else 'about '}{decimal(self.bytes)}"


def peak_of(
    work: Callable[[Sequence[Sample]], None],
    samples: Sequence[Sample],
    available: int,
    reserve: int = 0,
) -> Peak:
    """The peak memory of some work on a batch, after growing parts of it.

    Args:
        work: is given parts of the samples in which every token counts, and ``samples`` at last.
        samples: the batch, longest first.
        available: bytes that may be used.
        reserve: bytes that the whole batch may take in addition.
    """
    rows, longest = len(samples), len(samples[0].tokens)
    lengths = [longest >> n for n in (3, 2, 1) if longest >> n >= SHORTEST_PART]
    sizes = [(1, length) for length in lengths]
    sizes += [(1 << n, longest) for n in range(rows.bit_length()) if 1 << n < rows]
    sizes.append((rows, longest))
    seen: list[tuple[int, int, int]] = []
    for size in sizes:
        whole = size == (rows, longest)
        expected = _expected(seen, *size) + reserve * whole
        if expected > available:
            return Peak(expected, False)
        mx.clear_cache()
        mx.reset_peak_memory()
        part = [Sample(s.tokens[: size[1]], 1) for s in samples[: size[0]]]
        work(samples if whole else part)
        seen.append((*size, mx.get_peak_memory()))
    return Peak(seen[-1][2], True)


def _expected(seen: list[tuple[int, int, int]], rows: int, length: int) -> int:
    """The peak of a part, from the two before it: linear in rows, up to squared in the length."""
    if len(seen) < 2:
        return 0
    (rows_0, length_0, peak_0), (rows_1, length_1, peak_1) = seen[-2:]
    slope = max(peak_1 - peak_0, 0) / (rows_1 * length_1 - rows_0 * length_0)
    bend = 2 if length > length_1 else 1
    return int(peak_1 + bend * slope * (rows * length - rows_1 * length_1))
