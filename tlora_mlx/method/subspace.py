"""The task subspace: top right singular vectors of W·C (TLoRA, section "Initialise")."""

from __future__ import annotations

import mlx.core as mx

from tlora_mlx.method import linalg


def task_subspace(weight: mx.array, covariance: mx.array, rank: int) -> mx.array:
    """A's value: the ``rank`` top right singular vectors of ``weight @ covariance``.

    Only the subspace is defined: signs, and the order inside a cluster of equal singular values,
    are free.

    Args:
        weight: W (out, in), any float dtype.
        covariance: C (in, in), float32. Its scale does not matter to the result.
        rank: between 1 and min(out, in).

    Returns:
        (rank, in) float32 with orthonormal rows, evaluated.

    Raises:
        ValueError: ``rank`` is outside 1..min(out, in), or W·C is not finite.

    Source: paper, section 3.2; Rambo-Yi/TLora e3463ae, ``peft/tuners/lora/layer.py::tlora_init``.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} is not between 1 and min{tuple(weight.shape)}")
    # Scaled so that large activations cannot overflow float32; the vectors stay the same.
    largest = mx.abs(covariance).max()
    scaled = covariance / mx.where(largest > 0, largest, 1.0)
    product = weight.astype(mx.float32) @ scaled
    if not mx.isfinite(product).all().item():
        raise ValueError("W·C has entries that are not finite")
    _, _, vt = linalg.svd(product)
    return mx.contiguous(vt[:rank])
