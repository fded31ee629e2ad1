"""Mamba-2's state space, and Bailing's linear attention, in chunks, for gradients.

With S the state of a head (N, P), one token does

    S ← g S + B (dt x)ᵀ;   y = Sᵀ C + D x,   g = exp(−exp(A_log) dt)

mlx-lm computes it in chunks too (``ssm_attn``), but the outputs of what came before a chunk by a
product of each token's C with the state, whose gradient is an array of a state for each token.
Bailing's linear attention is the same with q and k for C and B, v for dt x and a constant g, token
by token in mlx-lm.

Source: Dao, Gu, "Transformers are SSMs", section 6 (arXiv 2405.21060); the interfaces are those of
mlx_lm/models/ssm.py and bailing_moe_linear.py.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.models.chunks import CLOSED, decays, each_chunk, into_chunks


def ssm_update(
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What mlx-lm's function of this name computes, in float32.

    Args:
        hidden_states: x (batch, T, H, P).
        A_log, D, dt_bias: (H,).
        B, C: (batch, T, G, N); H is a multiple of G.
        dt: (batch, T, H), before bias, softplus and ``time_step_limit``.
        state: (batch, H, P, N); None for zeros.
        mask: (batch, T) bool: a token that is False leaves the state as it is.
        lengths: (batch,) tokens from there on leave it as it is too.

    Returns:
        y (batch, T, H, P) in x's dtype, and the state after the last token, float32.
    """
    x, tokens = hidden_states, hidden_states.shape[1]
    dt = mx.clip(nn.softplus(dt.astype(mx.float32) + dt_bias), *time_step_limit)
    log_g = -mx.exp(A_log.astype(mx.float32)) * dt
    added = dt[..., None] * x
    if lengths is not None:
        within = mx.arange(tokens) < lengths[:, None]
        mask = within if mask is None else mask & within
    if mask is not None:
        log_g = mx.where(mask[..., None], log_g, 0.0)
        added = mx.where(mask[..., None, None], added, 0.0)
    y, state = linear_attention(C, B, added, log_g, state)
    return y.astype(x.dtype) + x * D[:, None], state


def recurrent_gla(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    scale: float,
    h: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What mlx-lm's function of this name computes, in float32.

    Args:
        q, k: (batch, H, T, N).
        v: (batch, H, T, P).
        g: (H,) the gates' logarithms.
        scale: of q.
        h: the state (batch, H, N, P); None for zeros.

    Returns:
        y (batch, H, T, P) in q's dtype, and the state after the last token, float32.
    """
    # mlx-lm rounds the gates, and so does whoever uses the adapter.
    log_g = mx.log(mx.exp(g).astype(q.dtype).astype(mx.float32))
    queries, keys, values = (x.swapaxes(1, 2) for x in (q * scale, k, v))
    state = None if h is None else h.swapaxes(-1, -2)
    y, state = linear_attention(
        queries, keys, values, mx.broadcast_to(log_g, queries.shape[:3]), state
    )
    return y.swapaxes(1, 2).astype(q.dtype), state.swapaxes(-1, -2)


def linear_attention(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """S ← g S + k vᵀ; y = Sᵀ q, in float32.

    Args:
        q, k: (batch, T, G, N); the number of heads is a multiple of G.
        v: (batch, T, H, P).
        log_g: (batch, T, H), at most 0.
        state: (batch, H, P, N); None for zeros.

    Returns:
        y (batch, T, H, P), and the state after the last token.
    """
    batch, tokens, heads, width = v.shape
    groups, states = k.shape[2:]
    repeats = heads // groups
    log_g = mx.maximum(log_g, CLOSED)
    # (batch, G, chunks, size, …), and (batch, G, heads of a group, chunks, size, …).
    keys, queries = into_chunks(k), into_chunks(q)
    v, gate = (
        into_chunks(y).reshape(batch, groups, repeats, *keys.shape[2:4], -1)
        for y in (v, log_g[..., None])
    )
    gate = mx.cumsum(gate, axis=-2)
    scores = queries @ keys.swapaxes(-1, -2)
    y = (scores[:, :, None] * decays(gate)) @ v

    def side_by_side(x: mx.array) -> mx.array:
        """The heads of a group beside each other: (batch, G, chunks, size, repeats · P)."""
        return x.transpose(0, 1, 3, 4, 2, 5).flatten(-2)

    last = gate[..., -1:, :]
    more = keys.swapaxes(-1, -2) @ side_by_side(mx.exp(last - gate) * v)
    kept = side_by_side(mx.broadcast_to(mx.exp(last), (*last.shape[:-1], width)))
    if state is None:
        s = mx.zeros((batch, groups, 1, states, repeats * width))
    else:
        s = state.astype(mx.float32).reshape(batch, groups, 1, -1, states).swapaxes(-1, -2)
    before = []
    for added, remaining in each_chunk(more, kept):
        before.append(s)
        s = remaining * s + added
    earlier = queries @ mx.concatenate(before, axis=2)
    earlier = earlier.reshape(*earlier.shape[:-1], repeats, width).transpose(0, 1, 4, 2, 3, 5)
    y = (y + mx.exp(gate) * earlier).reshape(batch, heads, -1, width)[:, :, :tokens]
    return y.transpose(0, 2, 1, 3), s.swapaxes(-1, -2).reshape(batch, heads, width, states)
