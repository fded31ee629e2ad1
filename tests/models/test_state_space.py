"""Mamba-2's state space and Bailing's linear attention, compared with mlx-lm's."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.gradients import peak_of_gradients
from mlx.utils import tree_flatten
from mlx_lm.models import bailing_moe_linear, ssm

from tlora_mlx.models.differentiable import differentiable, differentiable_operations
from tlora_mlx.models.state_space import recurrent_gla, ssm_update

EARLY = mx.arange(90)[None] >= mx.array([[0], [7]])
LATE = mx.arange(90)[None] < mx.array([[90], [31]])
BATCH, HEADS, WIDTH, GROUPS, STATES = 2, 6, 5, 2, 8


def inputs(tokens):
    mx.random.seed(tokens)
    x = mx.random.normal((BATCH, tokens, HEADS, WIDTH))
    b, c = mx.random.normal((2, BATCH, tokens, GROUPS, STATES))
    a_log, d, dt_bias = mx.random.normal((3, HEADS))
    dt = mx.random.normal((BATCH, tokens, HEADS))
    return [x, a_log, b, c, d, dt, dt_bias, mx.random.normal((BATCH, HEADS, WIDTH, STATES))]


@pytest.mark.parametrize(
    ("tokens", "stateless", "mask", "lengths"),
    [
        (1, False, None, None),
        (150, True, None, None),
        (300, False, None, None),
        (90, False, EARLY, None),
        (90, True, LATE, mx.array([90, 31])),  # mlx-lm has a mask for these lengths too
    ],
)
def test_like_mlx_lm(tokens, stateless, mask, lengths):
    """Values and gradients, with a state, masks and grouped heads."""
    arrays = inputs(tokens)[: 7 if stateless else 8]
    seen = mx.ones((BATCH, tokens)) if mask is None else mask
    mx.random.seed(0)
    weights = mx.random.normal((BATCH, tokens, HEADS, WIDTH)) * seen[..., None, None]
    state_weights = mx.random.normal((BATCH, HEADS, WIDTH, STATES))

    def results(function):
        options = {"mask": mask, "lengths": lengths}

        def loss(*arrays):
            y, state = function(*arrays, **options)
            return (weights * y).sum() + (state_weights * state).sum()

        y, state = function(*arrays, **options)
        gradients = mx.grad(loss, argnums=list(range(len(arrays))))(*arrays)
        return [y * seen[..., None, None], state, *gradients]

    pairs = zip(results(ssm_update), results(ssm.ssm_update), strict=True)
    for i, (ours, theirs) in enumerate(pairs):
        ours, theirs = np.array(ours), np.array(theirs)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), i


def test_the_gradient_keeps_no_state_of_each_token():
    heads, width, states = 4, 32, 64
    gates = [mx.zeros((heads,))] * 3

    def loss(x, b, c, dt):
        return ssm_update(x, gates[0], b, c, gates[1], dt, gates[2])[0].sum()

    def peak(tokens):
        x, dt = (mx.random.normal((1, tokens, heads, *rest)) for rest in ((width,), ()))
        arrays = [x, *mx.random.normal((2, 1, tokens, 1, states)), dt]
        mx.eval(gates)
        return peak_of_gradients(loss, arrays)

    assert peak(1024) - peak(512) < 512 * heads * width * states * 4


@pytest.mark.parametrize(
    ("tokens", "stateless", "dtype", "tolerance"),
    [
        (1, False, mx.float32, 1e-5),
        (150, True, mx.float32, 1e-5),
        (64, False, mx.float32, 1e-5),
        (200, False, mx.bfloat16, 0.01),
    ],
)
def test_bailings_linear_attention(tokens, stateless, dtype, tolerance):
    """Like mlx-lm's loop; in half precision as with its gates there, where 0.998 becomes 1."""
    mx.random.seed(tokens)
    q, k = mx.random.normal((2, BATCH, HEADS, tokens, STATES)).astype(dtype)
    v = mx.random.normal((BATCH, HEADS, tokens, WIDTH)).astype(dtype)
    g = -mx.array([150.0, 1.0, 0.3, 0.004, 0.002, 0.0])
    h = mx.random.normal((BATCH, HEADS, STATES, WIDTH)).astype(dtype)
    arrays = [q, k, v, *([] if stateless else [h])]
    weights = mx.random.normal(v.shape), mx.random.normal(h.shape)

    def results(function, g, arrays):
        def outputs(q, k, v, h=None):
            return function(q, k, v, g, 0.5, h)

        def loss(*arrays):
            return sum((w * z).sum() for w, z in zip(weights, outputs(*arrays), strict=True))

        return [*outputs(*arrays), *mx.grad(loss, argnums=list(range(len(arrays))))(*arrays)]

    found = results(recurrent_gla, g, arrays)
    rounded = mx.log(mx.exp(g).astype(dtype).astype(mx.float32))
    exact = [x.astype(mx.float32) for x in arrays]
    expected = results(bailing_moe_linear.recurrent_gla, rounded, exact)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        ours, theirs = np.array(ours.astype(mx.float32)), np.array(theirs)
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), i


def test_bailing_is_differentiated_without_its_loop(monkeypatch):
    mx.random.seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "num_shared_experts": 1}
    args = bailing_moe_linear.ModelArgs(
        model_type="bailing_moe_linear",
        max_position_embeddings=32,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        first_k_dense_replace=1,
        layer_group_size=2,
        group_norm_size=1,
        **sizes,
        **heads,
        **experts,
    )
    model = bailing_moe_linear.Model(args)

    def gradients():
        def loss(model):
            return mx.square(model(mx.arange(70)[None] % 20)[..., ::3]).sum()

        return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))

    expected = gradients()
    mx.eval(expected)
    monkeypatch.setattr(bailing_moe_linear, "recurrent_gla", None)
    with differentiable(model):
        found = gradients()
    for name, theirs in expected.items():
        ours, theirs = np.array(found[name]), np.array(theirs)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), name


def test_bailings_other_model_has_chunks_of_its_own():
    hybrid = pytest.importorskip("mlx_lm.models.bailing_hybrid")
    in_chunks = hybrid.recurrent_gla
    with differentiable_operations():
        assert hybrid.recurrent_gla is in_chunks
