"""Several processes (``mlx.launch``) as one: sums, shares, and what the first of them says.

Every function here is called by all processes in the same order, and one collective is under way at
a time: what goes in is evaluated before and what comes out after, on the CPU stream, so that the
GPU never waits for the network (such waits have deadlocked and been killed: ml-explore/mlx issues
3830, 4475). Where there is one process, everything is itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

# Bytes that go into one collective, so that each takes seconds at most, on a slow network too.
PIECE = 2**24
# Seconds in which a watch over this process, where there is one, ends it and says why.
WATCHED = 2.0
# How many collectives this process has begun and ended: whoever watches over it reads them.
begun = 0
ended = 0


def processes() -> int:
    """How many there are."""
    return mx.distributed.init().size()


def rank() -> int:
    """This process's number, from 0 on."""
    return mx.distributed.init().rank()


def is_first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return rank() == 0


def share(items: list) -> list:
    """This process's part of a list that all processes have; the whole where there is only one."""
    return items[rank() :: processes()]


def total(array: mx.array) -> mx.array:
    """The sum of all processes' arrays, evaluated: the same bits everywhere.

    Raises:
        ConnectionError: another process is gone.
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
    """``total`` of every array in a tree of float32 arrays, in as few collectives as can be."""
    if processes() == 1:
        return tree
    arrays = [array for _, array in tree_flatten(tree)]
    sums = total(mx.concatenate([array.reshape(-1) for array in arrays]))
    ends = np.cumsum([array.size for array in arrays]).tolist()
    parts = iter(mx.split(sums, ends[:-1]))
    return tree_map(lambda array: next(parts).reshape(array.shape), tree)


def largest(number: int) -> int:
    """The largest of all processes' numbers (of 32 bits)."""
    if processes() == 1:
        return number
    return int(_collective(mx.distributed.all_max, mx.array([number], mx.int32)).item())


def from_process(number: int, value: Any) -> Any:
    """What process ``number`` gives, to all: anything that JSON can hold; others' is ignored."""
    if processes() == 1:
        return value
    text = json.dumps(value).encode() if rank() == number else b""
    size = int(total(mx.array([len(text)], mx.int32)).item())
    data = np.frombuffer(text or bytes(size), np.uint8)
    return json.loads(bytes(np.array(total(mx.array(data)))))


def from_first(value: Any) -> Any:
    """What the first process gives, to all: anything that JSON can hold."""
    return from_process(0, value)


def from_each(value: Any) -> list:
    """What each process gives, in their order."""
    return [from_process(number, value) for number in range(processes())]


def tensors_from_first(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The first process's arrays, to all, bit for bit; the others need not know their names."""
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
    except RuntimeError as error:  # the ring's, since MLX 0.32; before, it waits for ever
        time.sleep(WATCHED)
        raise ConnectionError(f"the connection to another process was lost: {error}") from None
    ended += 1
    return result
