"""Statistics of several processes (``mlx.launch``) added up."""

from __future__ import annotations

import mlx.core as mx


def total(array: mx.array) -> mx.array:
    """The sum of all processes' arrays, evaluated; the array itself where there is one process."""
    group = mx.distributed.init()
    if group.size() > 1:
        array = mx.distributed.all_sum(array, group=group)
    mx.eval(array)
    return array


def share(items: list) -> list:
    """This process's part of a list that all processes have; the whole where there is only one."""
    group = mx.distributed.init()
    return items[group.rank() :: group.size()]
