"""The gated delta rule in chunks, for gradients: matrix products where mlx-lm loops over tokens.

With S the state of a head (Dk, Dv), the rule for one token is

    S ← diag(g) S;   δ = β (v − Sᵀ k);   S ← S + k δᵀ;   y = Sᵀ q

(Qwen3-Next, Qwen3.5, OLMo Hybrid with one g for each head, Kimi Linear with one for each of its
dimensions; RWKV-7 erases along other vectors than it writes to). mlx-lm computes it token by token,
in a Metal kernel without a gradient, or in a loop whose gradient keeps every token's state. In a
chunk of tokens, with Γ the cumulative product of the gates, the δ solve a triangular system,

    (1 + L) δ = β v − β (Γ k) S₀,   L_ij = β_i k_iᵀ diag(Γ_i / Γ_j) k_j   for j < i,

so only the chunks follow one another, and only their states are kept.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", section 3.3 (arXiv 2412.06464), "Kimi
Linear", section 4 (arXiv 2510.26692), and Peng et al., "RWKV-7 Goose" (arXiv 2503.14456); the
interfaces are those of mlx_lm/models/gated_delta.py and rwkv7.py.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.models.chunks import CLOSED, decays, each_chunk, into_chunks


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = False,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """What mlx-lm's function of this name computes; for a gradient, whatever ``use_kernel`` says.

    Args:
        q, k: (B, T, Hk, Dk), normalized and scaled.
        v: (B, T, Hv, Dv); Hv is a multiple of Hk.
        a: (B, T, Hv), or (B, T, Hv, Dk) for gates of their own in each dimension.
        b: (B, T, Hv): β is its sigmoid, or twice that with ``allow_neg_eigval``.
        A_log, dt_bias: the gates' parameters, broadcast with ``a``.
        state: (B, Hv, Dv, Dk); None for zeros.
        mask: (B, T) bool: a token that is False leaves the state as it is, and its output, of which
            mlx-lm makes no use, is something else here.
        lower_bound: of the gates' logarithm (Kimi); None for none.

    Returns:
        y (B, T, Hv, Dv) in q's dtype, and the state after the last token, float32.
    """
    beta = mx.sigmoid(b)
    if allow_neg_eigval:
        beta = beta * 2.0
    rate = mx.exp(A_log.astype(mx.float32))
    # The gate's logarithm itself: a gate that underflows to 0 has none, and a wrong gradient.
    if lower_bound is None:
        log_g = -rate * nn.softplus(a + dt_bias)
    else:
        log_g = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    return gated_delta(q, k, v, log_g, beta, state, mask)


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The rule with the gates' logarithms ``log_g``, of ``a``'s shape; else as the function above.

    Everything is computed in float32.
    """
    heads = v.shape[2]
    if log_g.ndim == 3:
        log_g = log_g[..., None]
    log_g, beta = log_g.astype(mx.float32), beta.astype(mx.float32)[..., None]
    if mask is not None:
        keep = mask[..., None, None]
        log_g, beta = mx.where(keep, log_g, 0.0), mx.where(keep, beta, 0.0)
    dtype, (q, k) = q.dtype, (mx.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
    y, state = _delta_rule(q, beta * k, k, beta * v, log_g, state)
    return y.astype(dtype), state


def wkv7(
    _layer: Any,
    r: mx.array,
    w: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """What mlx-lm's ``Rwkv7TimeMixing._wkv7`` computes, in float32.

    With S the state of a head, S ← diag(w) S + b (Sᵀ a)ᵀ + k vᵀ; y = Sᵀ r, where a meets the state
    before its gates.

    Args:
        r, w, k, v, a, b: (batch, T, H, D).
        state: (batch, H, D, D), the rows for v; None for zeros.

    Returns:
        y (batch, T, H, D) in r's dtype, and the state after the last token, float32.
    """
    w = w.astype(mx.float32)
    y, state = _delta_rule(r, -a / w, b, mx.zeros_like(v), mx.log(w), state, (k, v))
    return y.astype(r.dtype), state


def _delta_rule(
    q: mx.array,
    e: mx.array,
    b: mx.array,
    target: mx.array,
    log_g: mx.array,
    state: mx.array | None,
    also: tuple[mx.array, ...] = (),
) -> tuple[mx.array, mx.array]:
    """S ← diag(g) S;  δ = target − Sᵀ e;  S ← S + b δᵀ (+ k vᵀ);  y = Sᵀ q.

    Args:
        q, e, b: (batch, T, H, Dk).
        target: (batch, T, H, Dv).
        log_g: (batch, T, H, 1 or Dk).
        state: (batch, H, Dv, Dk); None for zeros.
        also: k and v, or nothing.

    Returns:
        y (batch, T, H, Dv), and the state after the last token, float32.
    """
    batch, tokens, heads, width = target.shape
    log_g = mx.maximum(log_g, CLOSED)
    q, e, b, target, log_g, *also = map(into_chunks, (q, e, b, target, log_g, *also))
    gate = mx.cumsum(log_g, axis=-2)  # log Γ
    keys = [b, *also[:1]]
    # Unpacked once: for its gradient, each unpacking keeps an array as long as the whole.
    by_q, by_e = zip(*(_decayed_products(mx.stack([q, e]), key, gate) for key in keys), strict=True)
    attention, (overlap, *others) = mx.concatenate(by_q, axis=-1), (mx.tril(x, -1) for x in by_e)
    for by_v, v in zip(others, also[1:], strict=True):
        target = target - by_v @ v
    solved, opened = _unit_lower_inverse(overlap), mx.exp(gate)
    delta_t, delta_s = solved @ target, solved @ (opened * e)
    last = gate[..., -1:, :]
    q, kept = opened * q, mx.exp(last).swapaxes(-1, -2)
    keys = mx.concatenate([mx.exp(last - gate) * key for key in keys], axis=-2)
    if state is None:
        s = mx.zeros((batch, heads, 1, q.shape[-1], width))
    else:
        s = state.astype(mx.float32).swapaxes(-1, -2)[:, :, None]
    ys = []
    for dt, ds, qs, ks, gates, scores, *v in each_chunk(
        delta_t, delta_s, q, keys, kept, attention, *also[1:]
    ):
        added = mx.concatenate([dt - ds @ s, *v], axis=-2)
        ys.append(qs @ s + scores @ added)
        s = gates * s + ks.swapaxes(-1, -2) @ added
    y = mx.concatenate(ys, axis=2).flatten(2, 3)[:, :, :tokens].transpose(0, 2, 1, 3)
    return y, s.squeeze(2).swapaxes(-1, -2)


def _decayed_products(x: mx.array, k: mx.array, gate: mx.array) -> mx.array:
    """x_iᵀ diag(Γ_i / Γ_j) k_j for j ≤ i, and 0 elsewhere: (…, size, size).

    No exponent is above 0. Of separate gates for each dimension, Γ_i / Γ_j would not fit into
    memory for all pairs, and Γ_i and 1 / Γ_j not into float32; so the pairs of two neighbouring
    blocks are computed with the gates from and to their border, for blocks of 1, 2, 4, … tokens.

    Args:
        x: (…, size, D); size is a power of 2.
        k: (…, size, D).
        gate: (…, size, 1 or D): log Γ.
    """
    size = k.shape[-2]
    if gate.shape[-1] == 1:
        return (x @ k.swapaxes(-1, -2)) * decays(gate)
    products = (x * k).sum(axis=-1)[..., None, None]
    half = 1
    while half < size:
        (_, later), (earlier, _), (before, after) = (_halves(y, half) for y in (x, k, gate))
        border = before[..., -1:, :]
        rows, columns = later * mx.exp(after - border), earlier * mx.exp(border - before)
        products = _joined(products, rows @ columns.swapaxes(-1, -2))
        half *= 2
    return products.squeeze(-3)


def _halves(x: mx.array, half: int) -> tuple[mx.array, mx.array]:
    """The first and second halves (…, n, half, D) of the n blocks of 2 · half rows of x."""
    x = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _joined(blocks: mx.array, below: mx.array) -> mx.array:
    """(…, n, 2h, 2h) of the blocks on the diagonal (…, 2n, h, h) and those below (…, n, h, h)."""
    first, second = blocks[..., ::2, :, :], blocks[..., 1::2, :, :]
    below = mx.broadcast_to(below, second.shape)
    upper = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
    return mx.concatenate([upper, mx.concatenate([below, second], axis=-1)], axis=-2)


@mx.custom_function
def _unit_lower_inverse(lower: mx.array) -> mx.array:
    """(1 + L)⁻¹ of strictly lower triangular L (…, size, size), by halves.

    The inverse's entries stay small where the powers of L do not, as for equal keys.
    """
    size = lower.shape[-1]
    inverse = mx.ones((*lower.shape[:-1], 1, 1))
    half = 1
    while half < size:
        n = size // (2 * half)
        blocks = lower.reshape(*lower.shape[:-2], n, 2 * half, n, 2 * half)
        below = mx.moveaxis(mx.diagonal(blocks, 0, -4, -2), -1, -3)[..., half:, :half]
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        inverse = _joined(inverse, -second @ below @ first)
        half *= 2
    return inverse.squeeze(-3)


@_unit_lower_inverse.vjp
def _(_primal: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    transposed = inverse.swapaxes(-1, -2)
    return -mx.tril(transposed @ cotangent @ transposed, -1)
