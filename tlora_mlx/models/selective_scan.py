"""Mamba's selective scan (falcon_mamba, jamba) in plain operations, for gradients.

With h the state of a channel (N), one token does

    h ← exp(Δ A) h + Δ x B;   y = C · h + D x

with a gate for each channel and each number of its state, so no matrix product computes several
tokens at once. mlx-lm computes token by token, and the gradient keeps each token's state several
times over. Here only the states between segments are kept for the gradient, which computes a
segment anew.

Source: Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", sections 3.2
and 3.3.2 (arXiv 2312.00752); the interface is mlx_lm/models/mamba.py's and jamba.py's.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.models.chunks import in_parts, linear_recurrence

# Tokens of a segment.
SEGMENT = 64


def selective_scan(
    x: mx.array,
    delta: mx.array,
    A: mx.array,
    B: mx.array,
    C: mx.array,
    state: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The state space of every channel, without D x.

    Args:
        x, delta: (batch, T, channels).
        A: (channels, N), negative.
        B, C: (batch, T, N).
        state: (batch, channels, N); None for zeros.

    Returns:
        y (batch, T, channels) and the state after the last token.
    """
    if state is None:
        state = mx.zeros((x.shape[0], *A.shape), dtype=x.dtype)
    ys = []
    segments = (in_parts(z, SEGMENT, axis=1) for z in (x, delta, B, C))
    for segment in zip(*segments, strict=True):
        y, state = _recomputed_segment(A, state, *segment)
        ys.append(y)
    return mx.concatenate(ys, axis=1), state


def _segment(
    A: mx.array, state: mx.array, x: mx.array, delta: mx.array, B: mx.array, C: mx.array
) -> tuple[mx.array, mx.array]:
    gate = mx.exp(delta[..., None] * A)
    added = (delta * x)[..., None] * B[..., None, :]
    first = added[:, :1] + gate[:, :1] * state[:, None]
    states = linear_recurrence(gate, mx.concatenate([first, added[:, 1:]], axis=1))
    # A copy: a part of the states would keep them all in memory.
    return (states @ C[..., None]).squeeze(-1), mx.contiguous(states[:, -1])


_recomputed_segment = mx.custom_function(_segment)


@_recomputed_segment.vjp
def _(
    primals: list[mx.array], cotangents: list[mx.array], _outputs: list[mx.array]
) -> list[mx.array]:
    # One segment after the other: with mx.checkpoint, MLX has the states of several in memory.
    primals = mx.depends(list(primals), list(cotangents))
    found_A, found_state, *found = mx.vjp(_segment, primals, list(cotangents))[1]
    found_state, *_ = mx.depends([found_state], [found_A, *found])
    return [found_A, found_state, *found]


def mamba_sequence(
    block: Any, x: mx.array, conv_cache: mx.array | None, state_cache: mx.array | None
) -> tuple[mx.array, tuple[mx.array, mx.array]]:
    """What mlx-lm's ``MambaBlock._process_sequence`` computes."""
    x, z = block.in_proj(x).split(2, axis=-1)
    kernel = block.conv_kernel_size
    if conv_cache is None:
        x = mx.pad(x, [(0, 0), (kernel - 1, 0), (0, 0)])
    else:
        x = mx.concatenate([conv_cache, x], axis=1)
    conv_cache = x[:, 1 - kernel :]
    x = nn.silu(block.conv1d(x))
    rank = block.time_step_rank
    delta, B, C = block.x_proj(x).split([rank, rank + block.ssm_state_size], axis=-1)
    if block.use_bcdt_rms:
        eps = block.args.mixer_rms_eps
        delta, B, C = (mx.fast.rms_norm(y, None, eps) for y in (delta, B, C))
    delta = nn.softplus(block.dt_proj(delta))
    y, state = selective_scan(x, delta, -mx.exp(block.A_log), B, C, state_cache)
    return block.out_proj(nn.silu(z) * (y + block.D * x)), (conv_cache, state)


def jamba_step(
    mixer: Any, x: mx.array, A: mx.array, state: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """What mlx-lm's ``JambaMambaMixer.ssm_step`` computes, for x (batch, T, channels)."""
    rank = mixer.time_step_rank
    delta, B, C = mixer.x_proj(x).split([rank, rank + mixer.ssm_state_size], axis=-1)
    delta, B, C = mixer.dt_layernorm(delta), mixer.b_layernorm(B), mixer.c_layernorm(C)
    y, state = selective_scan(x, nn.softplus(mixer.dt_proj(delta)), A, B, C, state)
    return y + mixer.D * x, state
