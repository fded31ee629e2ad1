"""Sensitivities: the mean of |W ⊙ ∂loss/∂W|, with the gradient formed a piece at a time."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.method.experts import routed_rows
from tlora_mlx.method.layers import dense_weight, linear_shape

# Entries of ∂loss/∂W formed at a time: 16 MB of float32; of a stack of experts, 64 MB.
PIECE = 2**22
STACK_PIECE = 2**24

# |W ⊙ ∂loss/∂W|, compiled: one pass over memory, not two.
_magnitudes = mx.compile(lambda weight, gradient: mx.abs(weight * gradient))


def mean_products(linear: nn.Module, samples: list[tuple[mx.array, mx.array]]) -> mx.array:
    """mean_ij |W_ij · (δᵀX)_ij| of each sample, (batch,) float32, a few of W's rows at a time.

    Args:
        linear: the layer with W (out, in); if quantized, W is dequantized piece by piece.
        samples: δ (T, out) and X (T, in) of each sample, any float dtype.
    """
    out_features, in_features = linear_shape(linear)
    samples = [(d.astype(mx.float32), x.astype(mx.float32)) for d, x in samples]
    step = max(1, PIECE // in_features)
    sums = mx.zeros((len(samples),))
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        weight = dense_weight(linear, rows)
        products = (_magnitudes(weight, d[:, rows].T @ x) for d, x in samples)
        # Row by row: one float32 sum over a whole matrix drifts (2.8e-3 too low at 2048²).
        sums = sums + mx.stack([product.sum(axis=1).sum() for product in products])
    return sums / (out_features * in_features)


def mean_products_of_experts(
    switch: nn.Module, delta: mx.array, x: mx.array, indices: mx.array
) -> mx.array:
    """The same of each expert of a stacked layer, (E,) float32, for one sample.

    The rows are sorted by expert, and δᵀX is summed over each expert's: there is no loop over the
    experts, and nothing is evaluated to see which tokens go where.

    Args:
        switch: the stacked layer with W (E, out, in), quantized or not.
        delta: (…, 1, out), where … is ``indices``' shape.
        x: (…, 1, in), where … is ``indices``' shape, or has 1 as its last dimension.
        indices: (…) integers: which expert each row goes to.
    """
    experts, (out_features, in_features) = switch.num_experts, linear_shape(switch)
    delta, x = (routed_rows(y, indices).astype(mx.float32) for y in (delta, x))
    order = mx.argsort(indices.flatten())
    delta, x = delta[order], x[order]
    counts = mx.zeros((experts,), mx.uint32).at[indices.flatten()].add(1)
    ends = mx.cumsum(counts)
    segments = mx.stack([ends - counts, ends], axis=-1)
    many = max(1, STACK_PIECE // (out_features * in_features))
    step = max(1, STACK_PIECE // (many * in_features))
    found = []
    for first in range(0, experts, many):
        some, sums = slice(first, first + many), 0.0
        for start in range(0, out_features, step):
            rows = slice(start, start + step)
            gradient = mx.segmented_mm(delta[:, rows].T, x, segments[some])
            products = _magnitudes(dense_weight(switch, rows, some), gradient)
            sums = sums + products.sum(axis=2).sum(axis=1)
        found.append(sums)
    return mx.concatenate(found) / (out_features * in_features)
