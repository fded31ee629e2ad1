"""Mamba-2's state space, compared with mlx-lm's."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import ssm

from tlora_mlx.models.state_space import ssm_update

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
        mx.eval(arrays, gates)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(loss, argnums=[0, 1, 2, 3])(*arrays))
        return mx.get_peak_memory() - before

    assert peak(1024) - peak(512) < 512 * heads * width * states * 4
