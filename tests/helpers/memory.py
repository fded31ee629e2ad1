"""The memory that a computation takes, by MLX's counter."""

import mlx.core as mx

from helpers.metal import on_the_cpu


def peak_memory(run):
    """Bytes that ``run()`` takes at most, beyond the arrays that are there before it.

    Measured on the CPU even where there is a GPU, which holds what an operation has read until its
    commands are done: up to ten command buffers later, or after a CUDA graph of 1 GB
    (mlx/transforms.cpp, mlx/backend/cuda/device.cpp). So its peak says little about what is kept.
    """
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with on_the_cpu():
        run()
    return mx.get_peak_memory() - before
