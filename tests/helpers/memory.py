"""The memory that a computation takes, by MLX's counter."""

import mlx.core as mx

from helpers.metal import on_the_cpu


def peak_memory(run):
    """Bytes that ``run()`` takes at most, beyond the arrays that are there before it.

    On the CPU, beside a GPU too. A GPU holds what an operation read until its commands are done,
    those of up to ten command buffers, or of a CUDA graph of 1 GB (mlx/transforms.cpp,
    mlx/backend/cuda/device.cpp), so that there the peak tells little of what is kept for long.
    """
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with on_the_cpu():
        run()
    return mx.get_peak_memory() - before
