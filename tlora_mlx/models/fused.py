"""mlx-lm's fused kernels (muse_spark) in plain operations, which have a gradient.

Each function computes what mlx-lm's of the same name does, in float32, and rounds to the input's
dtype where the kernel does. mlx-lm has these operations as Metal kernels alone, so no CPU could run
the model without the functions here.

Source: mlx_lm/kernels, from mlx-lm 0.32.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def qk_norm(
    qkvg: mx.array,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    eps: float,
    query_scale: float,
) -> list[mx.array]:
    """Normalized queries, scaled, and keys, of the first columns of qkvg.

    Args:
        qkvg: (batch, T, width): queries, keys, values and gates, a head after the other.

    Returns:
        q (batch, T, n_heads, head_dim) and k (batch, T, n_kv_heads, head_dim), in qkvg's dtype.
    """
    heads = n_heads + n_kv_heads
    qk = qkvg[..., : heads * head_dim].reshape(*qkvg.shape[:-1], heads, head_dim)
    q, k = mx.split(mx.fast.rms_norm(qk, None, eps), [n_heads], axis=-2)
    return [(q.astype(mx.float32) * query_scale).astype(q.dtype), k]


def qk_norm_rope(
    qkvg: mx.array, *, rope_base: float, offset: int | mx.array, **settings: int | float
) -> list[mx.array]:
    """``qk_norm``, which takes the settings, rotated.

    The first token is at ``offset``, of each row if it is an array.
    """

    def rotated(x: mx.array) -> mx.array:
        width, x = x.shape[-1], x.swapaxes(1, 2)
        x = mx.fast.rope(x, width, traditional=True, base=rope_base, scale=1.0, offset=offset)
        return x.swapaxes(1, 2)

    return [rotated(x) for x in qk_norm(qkvg, **settings)]


def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    """(batch, T, H · D): each head of x (batch, H, T, D) normalized, times gate's sigmoid."""
    normed = mx.fast.rms_norm(x.swapaxes(1, 2).astype(mx.float32), None, eps).flatten(-2)
    return (normed * mx.sigmoid(gate.astype(mx.float32))).astype(x.dtype)


def expert_routing(
    logits: mx.array,
    expert_bias: mx.array,
    *,
    top_k: int,
    multiplier: float,
    score_eps: float,
    route_scale: float,
) -> list[mx.array]:
    """Each token's experts, uint32 (…, top_k), the best first, and their weights, float32.

    Args:
        logits: (…, experts), float32.
        expert_bias: (experts,), which counts for the choice alone.
    """
    scores = mx.sigmoid(logits * multiplier)
    chosen = mx.stop_gradient(mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k])
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + score_eps) * route_scale
    return [chosen, weights]


def post_expert_norm_combine(
    experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float
) -> mx.array:
    """(…, D): the sum of the outputs of a token's experts (…, K, D), times norm_weight, normalized,
    times weights (…, K)."""
    scaled = experts.astype(mx.float32) * norm_weight.astype(mx.float32)
    weights = weights.astype(experts.dtype).astype(mx.float32)
    normed = mx.fast.rms_norm(scaled, None, eps)
    return (weights[..., None] * normed).sum(axis=-2).astype(experts.dtype)


def norm_add_norm(
    branch: mx.array,
    stream: mx.array,
    *,
    alpha: mx.array,
    beta: mx.array,
    post_weight: mx.array | None,
    post_eps: float,
    next_norm: nn.RMSNorm | None,
) -> tuple[mx.array, mx.array | None]:
    """alpha · stream + beta · branch, normalized after post_weight; and that sum under next_norm.

    Args:
        branch: (…, D).
        stream: (…, D), float32, as is the sum.
        alpha, beta: (D,), float32.
        post_weight: (D,), or None for none.
        next_norm: None for no second result; it is in branch's dtype.
    """
    if post_weight is not None:
        weight = post_weight.astype(branch.dtype).astype(mx.float32)
        branch = (weight * branch.astype(mx.float32)).astype(branch.dtype)
    stream = alpha * stream + beta * mx.fast.rms_norm(branch, None, post_eps)
    if next_norm is None:
        return stream, None
    return stream, pre_norm(stream, next_norm, dtype=branch.dtype)


def pre_norm(stream: mx.array, norm: nn.RMSNorm, *, dtype: mx.Dtype) -> mx.array:
    """The float32 stream (…, D) under norm, as ``dtype``."""
    return mx.fast.rms_norm(stream, norm.weight.astype(mx.float32), norm.eps).astype(dtype)


FUSED = {
    function.__name__: function
    for function in (
        expert_routing,
        norm_add_norm,
        post_expert_norm_combine,
        pre_norm,
        qk_norm,
        qk_norm_rope,
        rms_norm_sigmoid_gate,
    )
}
