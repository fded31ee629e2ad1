"""What a module's inputs look like: the covariance C of TLoRA's section "Calibrate"."""

from __future__ import annotations

import mlx.core as mx


def centred_gram(inputs: mx.array) -> mx.array:
    """One sample's contribution to C, before the average over samples.

    Args:
        inputs: X (T, in), the module's inputs on all tokens of one sample, any float dtype.

    Returns:
        (X − mean_t X)ᵀ (X − mean_t X), (in, in) float32: centred per sample, summed over its
        tokens and not divided by their number.

    Source: Rambo-Yi/TLora e3463ae, ``peft/tuners/lora/tlora.py::preprocess_tlora``.
    """
    x = inputs.astype(mx.float32)
    x = x - x.mean(axis=0, keepdims=True)
    return x.T @ x
