"""The learning rate of each update, as a function of the update's number."""

from __future__ import annotations

import math


def learning_rate(update: int, updates: int, peak: float, schedule: str, warmup: float) -> float:
    """The rate of update number ``update`` (0 … updates − 1).

    Args:
        update: how many updates came before.
        updates: how many there are in all.
        peak: the rate right after the warm-up.
        schedule: ``cosine`` or ``linear`` (both end at 0 after the last update) or ``constant``.
        warmup: share of all updates in which the rate rises linearly; the first is above 0.
    """
    warmup_updates = math.ceil(updates * warmup)
    if update < warmup_updates:
        return peak * (update + 1) / warmup_updates
    progress = (update - warmup_updates) / max(updates - warmup_updates, 1)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1 - progress)
    return peak
