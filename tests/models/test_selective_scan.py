"""Mamba's selective scan, compared with mlx-lm's loops."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.gradients import assert_like_mlx_lm, peak_of_gradients
from mlx_lm.models import jamba, mamba

from tlora_mlx.models.selective_scan import selective_scan

SIZES = {"vocab_size": 8, "hidden_size": 6, "num_hidden_layers": 1}


def mamba_block(model_type):
    args = mamba.ModelArgs(
        model_type=model_type,
        **SIZES,
        intermediate_size=12,
        state_size=4,
        conv_kernel=4,
        use_bias=True,
        use_conv_bias=True,
        time_step_rank=3,
    )
    return mamba.MambaBlock(args), "_process_sequence"


def jamba_mixer():
    args = jamba.ModelArgs(
        model_type="jamba",
        **SIZES,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=4,
        mamba_expand=2,
        num_experts=2,
        num_experts_per_tok=1,
        rms_norm_eps=1e-5,
        max_position_embeddings=32,
        mamba_dt_rank=3,
    )
    return jamba.JambaMambaMixer(args), "_process_sequence"


@pytest.mark.parametrize(
    ("make", "tokens", "continued"),
    [
        (lambda: mamba_block("mamba"), 150, False),
        (lambda: mamba_block("falcon_mamba"), 64, True),
        (lambda: mamba_block("mamba"), 1, True),
        (jamba_mixer, 83, True),
        (jamba_mixer, 70, False),
    ],
)
def test_like_mlx_lm(make, tokens, continued):
    """Outputs, both states, and every gradient, with closed gates and without a state before."""
    mx.random.seed(tokens)
    block, method = make()
    block.apply(lambda p: p + 0.3 * mx.random.normal(p.shape))
    # Some channels forget everything at once: their gates are 0 in float32.
    block.A_log = mx.where(mx.arange(12)[:, None] % 5 == 0, 6.0, block.A_log)
    x = mx.random.normal((2, tokens, 6))
    caches = [mx.random.normal((2, 3, 12)), mx.random.normal((2, 12, 4))] if continued else []

    def outputs(parameters, x, *caches):
        block.update(parameters)
        y, states = getattr(block, method)(x, *(caches or (None, None)))
        return [y, *states]

    assert_like_mlx_lm(outputs, [block.trainable_parameters(), x, *caches])


def test_the_gradient_keeps_few_states():
    """mlx-lm's loop keeps the states (channels, N) of every token several times."""
    channels, states = 64, 16

    def loss(x, delta, b, c):
        y, _ = selective_scan(x, nn.softplus(delta), -mx.ones((channels, states)), b, c)
        return mx.square(y).sum()

    def peak(tokens):
        arrays = [*mx.random.normal((2, 1, tokens, channels))]
        arrays += [*mx.random.normal((2, 1, tokens, states))]
        return peak_of_gradients(loss, arrays)

    assert peak(1024) - peak(512) < 512 * channels * states * 4
