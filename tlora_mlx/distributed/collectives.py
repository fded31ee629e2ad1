"""Several processes (``mlx.launch``) working as one: sums, shares, and broadcasts.

All processes must call these functions in the same order, and only one collective runs at a time:
its input is evaluated before it and its output after it, on the CPU stream, so that the GPU never
waits for the network (such waits have deadlocked and been killed: ml-explore/mlx issues 3830,
4475). With a single process, every function returns its input.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

# Bytes per collective: few enough that each takes seconds at most, even on a slow network.
PIECE = 2**24
# Seconds that the watch, if there is one, gets to end this process and say why.
WATCH_DELAY = 2.0
# How many collectives this process has begun and ended; the watch reads them.
begun = 0
ended = 0


def processes() -> int:
    """How many processes there are."""
    return mx.distributed.init().size()


def rank() -> int:
    """This process's number, counted from 0."""
    return mx.distributed.init().rank()


def is_first() -> bool:
    """Whether this is the process that prints and writes for all."""
    return rank() == 0


def share(items: list) -> list:
    """This process's part of a list that all processes have; all of it if there is only one."""
    return items[rank() :: processes()]


def total(array: mx.array) -> mx.array:
    """The sum of all processes' arrays, evaluated: the same bits everywhere.

    Raises:
        ConnectionError: the connection to another process was lost.
    """
    mx.eval(array)
    if processes() == 1 or array.size == 0:
        return array
    flat, step = array.reshape(-1), PIECE // array.itemsize
    parts = [flat[start : start + step] for start in range(0, flat.size, step)]
    sums = mx.concatenate([_collective(mx.distributed.all_sum, part) for part in parts])
    sums = sums.reshape(array.shape)
    mx.eval(sums)
    return sums


def total_of_tree(tree: Any) -> Any:
    """``total`` of every array in a tree of float32 arrays, in as few collectives as possible."""
    if processes() == 1:
        return tree
    arrays = [array for _, array in tree_flatten(tree)]
    sums = total(mx.concatenate([array.reshape(-1) for array in arrays]))
    ends = np.cumsum([array.size for array in arrays]).tolist()
    parts = iter(mx.split(sums, ends[:-1]))
    return tree_map(lambda array: next(parts).reshape(array.shape), tree)


def largest(number: int) -> int:
    """The largest of all processes' numbers (32-bit integers)."""
    if processes() == 1:
        return number
    return int(_collective(mx.distributed.all_max, mx.array([number], mx.int32)).item())


def from_process(number: int, value: Any) -> Any:
    """Send process ``number``'s value (anything JSON can hold) to all; the others' is ignored."""
    if processes() == 1:
        return value
    text = json.dumps(value).encode() if rank() == number else b""
    size = int(total(mx.array([len(text)], mx.int32)).item())
    data = np.frombuffer(text or bytes(size), np.uint8)
    return json.loads(bytes(np.array(total(mx.array(data)))))


def from_first(value: Any) -> Any:
    """Send the first process's value (anything JSON can hold) to all."""
    return from_process(0, value)


def from_each(value: Any) -> list:
    """All processes' values, in their order."""
    return [from_process(number, value) for number in range(processes())]


def tensors_from_first(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Send the first process's arrays to all, bit for bit; the others need not know the names."""
    if processes() == 1:
        return dict(tensors)
    header = from_first(
        [(k, list(v.shape), str(v.dtype).split(".")[-1]) for k, v in tensors.items()]
    )
    received = {}
    for name, shape, kind in header:
        dtype = getattr(mx, kind)
        if is_first():
            data = mx.contiguous(tensors[name]).reshape(-1).view(mx.uint8)
        else:
            data = mx.zeros((int(np.prod(shape)) * dtype.size,), mx.uint8)
        received[name] = total(data).view(dtype).reshape(shape)
    return received


def _collective(operation: Callable[..., mx.array], array: mx.array) -> mx.array:
    global begun, ended
    mx.eval(array)
    begun += 1
    try:
        result = operation(array, stream=mx.cpu)
        mx.eval(result)
    except RuntimeError as error:  # from the ring, since MLX 0.32; older versions wait forever
        time.sleep(WATCH_DELAY)
        raise ConnectionError(f"the connection to another process was lost: {error}") from None
    ended += 1
    return result
