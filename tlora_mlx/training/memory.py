"""Memory on a Mac: what stays resident, and how much of what was freed MLX keeps for reuse.

Both defaults of MLX have crashed Macs while training. Its cache of freed buffers may grow to the
memory limit, and its peak counter does not show it: ml-explore/mlx-lm pull request 986 measured
51 GB instead of 7. A wired limit at the recommended maximum has ended in hard crashes, at 90 % of
it in none (ml-explore/mlx-lm issue 828).
"""

from __future__ import annotations

import os

import mlx.core as mx

# Share of the memory that Metal recommends for the GPU which is kept resident.
WIRED_SHARE = 0.9
# Share of it that freed buffers may take: enough for a step's, which are reused by the next.
CACHE_SHARE = 1 / 16


def limit_memory() -> None:
    """Bound resident memory and the cache of freed buffers, where Metal says what it recommends."""
    if recommended := mx.device_info().get("max_recommended_working_set_size"):
        mx.set_wired_limit(int(WIRED_SHARE * recommended))
        mx.set_cache_limit(int(CACHE_SHARE * recommended))


def machine_memory() -> int:
    """Bytes that Metal recommends for the GPU or, elsewhere, of all memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return recommended or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def end_stage() -> None:
    """Give back what a stage has freed: the next one needs buffers of other sizes."""
    mx.clear_cache()
