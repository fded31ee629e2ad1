"""Griffin's recurrence, the RG-LRU (recurrent_gemma), in plain operations, for gradients.

With a gate a of its own for each channel, one token does h ← a h + √(1 − a²) x. mlx-lm computes
token by token, and writes each into an array of all, whose gradient is another such array for each
token.

Source: De et al., "Griffin", section 2.4 (arXiv 2402.19427); the interface is
mlx_lm/models/recurrent_gemma.py's.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.models.chunks import linear_recurrence

# The gradient of √(1 − a²), which is infinite where a is rounded to 1, is bounded by this, as in
# transformers/models/recurrent_gemma/modeling_recurrent_gemma.py.
LARGEST_GRADIENT = 1000.0


def rg_lru(layer: Any, x: mx.array, cache: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """What mlx-lm's ``RGLRU`` computes, with a recurrence in float32.

    Args:
        layer: the module, for its parameters.
        x: (batch, T, channels).
        cache: the state (batch, channels); None for zeros.

    Returns:
        y (batch, T, channels) in x's dtype, and the state after the last token, float32.
    """
    heads = mx.unflatten(x, -1, (layer.num_heads, -1)).swapaxes(1, 2)

    def gate(weight: mx.array, bias: mx.array) -> mx.array:
        return mx.sigmoid(((heads @ weight).swapaxes(1, 2) + bias).flatten(2))

    opened = gate(layer.input_gate_weight, layer.input_gate_bias)
    closed = gate(layer.recurrent_gate_weight, layer.recurrent_gate_bias)
    log_a = -8.0 * closed * nn.softplus(layer.recurrent_param)
    a, share = mx.exp(log_a), _bounded_root(1 - mx.exp(2 * log_a))
    if cache is None:
        share = mx.concatenate([mx.ones_like(share[:, :1]), share[:, 1:]], axis=1)
    a, added = a.astype(mx.float32), (x * opened * share.astype(x.dtype)).astype(mx.float32)
    if cache is not None:
        added = mx.concatenate([added[:, :1] + a[:, :1] * cache[:, None], added[:, 1:]], axis=1)
    y = linear_recurrence(a, added)
    return y.astype(x.dtype), y[:, -1]


@mx.custom_function
def _bounded_root(x: mx.array) -> mx.array:
    return mx.sqrt(x)


@_bounded_root.vjp
def _(x: mx.array, cotangent: mx.array, _root: mx.array) -> mx.array:
    return cotangent / mx.sqrt(mx.maximum(4 * x, LARGEST_GRADIENT**-2))
