"""The gated delta rule in chunks, compared with mlx-lm's loop and with transformers."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.gradients import peak_of_gradients
from helpers.metal import wkv7 as loop_of_rwkv7
from mlx_lm.models import gated_delta as loop

from tlora_mlx.models.gated_delta import gated_delta, gated_delta_update, wkv7

KEYS, WIDTH = 32, 24


def inputs(tokens, key_heads=2, heads=4, vector=False):
    """q, k, v, a, b, A_log, dt_bias and the state of two samples."""
    mx.random.seed(tokens)
    gates = (heads, KEYS) if vector else (heads,)
    q, k = mx.random.normal((2, 2, tokens, key_heads, KEYS))
    q, k = loop.normalize_qk(q, k, inv_scale=KEYS**-0.5, eps=1e-6)
    v, a = (mx.random.normal((2, tokens, *rest)) for rest in ((heads, WIDTH), gates))
    b = mx.random.normal((2, tokens, heads))
    a_log, dt_bias = mx.random.normal((heads, 1) if vector else (heads,)), mx.random.normal(gates)
    return [q, k, v, a, b, a_log, dt_bias, mx.random.normal((2, heads, WIDTH, KEYS))]


def values_and_gradients(function, arrays, mask=None):
    """y and the state, and the gradients of a random weighting of both."""
    mx.random.seed(0)
    y, state = function(*arrays)
    seen = mx.ones(y.shape[:2]) if mask is None else mask
    weights = mx.random.normal(y.shape) * seen[..., None, None], mx.random.normal(state.shape)

    def loss(*arrays):
        return sum((w * r).sum() for w, r in zip(weights, function(*arrays), strict=True))

    gradients = mx.grad(loss, argnums=list(range(len(arrays))))(*arrays)
    return [y * seen[..., None, None], state, *gradients]


def assert_close(found, expected, tolerance):
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        ours, theirs = np.array(ours), np.array(theirs)
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), i


LATE = mx.arange(70)[None] >= mx.array([[0], [7]])


@pytest.mark.parametrize(
    ("tokens", "vector", "mask", "options"),
    [
        (1, False, None, {}),
        (3, True, None, {}),
        (100, False, None, {"allow_neg_eigval": True}),
        (130, True, None, {"lower_bound": -5.0}),
        (70, False, LATE, {}),
        (70, True, LATE, {}),
    ],
)
def test_like_mlx_lms_loop(tokens, vector, mask, options):
    """With a state, masks, grouped heads, gates of both kinds and lower bounds."""
    if options and not hasattr(loop, "compute_lower_bound_g"):
        pytest.skip("an older mlx-lm, without these options")
    arrays = inputs(tokens, vector=vector)
    ours, theirs = (
        values_and_gradients(lambda *x, f=f: f(*x, mask, use_kernel=False, **options), arrays, mask)
        for f in (gated_delta_update, loop.gated_delta_update)
    )
    assert_close(ours, theirs, 2e-5)


def torch_values_and_gradients(rule, arrays):
    """As ``values_and_gradients``, from transformers, whose function scales q."""
    tensors = [torch.tensor(np.array(x), requires_grad=True) for x in arrays]
    *sequences, state = tensors
    y, last = rule(*sequences, initial_state=state.swapaxes(-1, -2), output_final_state=True)
    mx.random.seed(0)
    weights = [torch.tensor(np.array(mx.random.normal(tuple(y.shape))))]
    weights.append(torch.tensor(np.array(mx.random.normal(state.shape))))
    results = [y, last.swapaxes(-1, -2)]
    sum((w * r).sum() for w, r in zip(weights, results, strict=True)).backward()
    return [*(r.detach() for r in results), *(x.grad for x in tensors)]


CASES = ["scalar", "vector", "closed gates", "closed vector gates", "equal keys"]


@pytest.mark.parametrize("case", CASES)
def test_like_transformers(case):
    """Gates that are 0 in float32 have finite gradients, equal keys a stable triangular system."""
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    vector = "vector" in case
    rule = modeling.recurrent_kimi_delta_attention
    if not vector:
        from transformers.models.qwen3_next import modeling_qwen3_next

        rule = modeling_qwen3_next.torch_recurrent_gated_delta_rule
    q, k, v, a, b, *_, state = inputs(100, 4, 4, vector)
    log_g, beta = -mx.exp(a), mx.sigmoid(b)
    if "closed" in case:
        log_g = mx.where(mx.arange(100).reshape(1, -1, *[1] * (a.ndim - 2)) % 9 == 4, -1e4, log_g)
    if case == "equal keys":
        k, beta, log_g = mx.broadcast_to(k[:, :1], k.shape), mx.ones_like(b), 0 * log_g
    scaled = lambda q, *rest: gated_delta(q * KEYS**-0.5, *rest)  # noqa: E731
    arrays = [q, k, v, log_g, beta, state]
    assert_close(
        values_and_gradients(scaled, arrays), torch_values_and_gradients(rule, arrays), 2e-5
    )


def test_bfloat16_is_computed_in_float32():
    arrays = [x.astype(mx.bfloat16) for x in inputs(100)]
    y, state = gated_delta_update(*arrays)
    expected, last = gated_delta_update(*(x.astype(mx.float32) for x in arrays))
    assert (y.dtype, state.dtype) == (mx.bfloat16, mx.float32)
    assert_close([y.astype(mx.float32), state], [expected, last], 2e-2)


@pytest.mark.parametrize(("tokens", "stateless"), [(1, False), (130, False), (64, True)])
def test_rwkv7_like_mlx_lms_loop(tokens, stateless):
    """With gates down to the smallest that the model can have, and vectors to erase of length 1."""
    mx.random.seed(tokens)
    r, w, k, v, a, b = mx.random.normal((6, 2, tokens, 3, KEYS))
    w = mx.exp(-0.606531 * mx.sigmoid(3 * w))
    a = a / mx.linalg.norm(a, axis=-1, keepdims=True)
    arrays = [r, w, k, v, -a, a * mx.sigmoid(b)]
    state = mx.random.normal((2, 3, KEYS, KEYS))

    def ours(*arrays):
        return wkv7(None, *arrays, *([None] if stateless else []))

    def theirs(*arrays):
        before = [mx.zeros_like(state)] if stateless else []
        return loop_of_rwkv7(inputs=[*arrays, *before, tokens], output_dtypes=[mx.float32] * 2)

    arrays += [] if stateless else [state]
    assert_close(values_and_gradients(ours, arrays), values_and_gradients(theirs, arrays), 1e-4)


@pytest.mark.parametrize("rule", ["delta", "rwkv7"])
def test_the_gradients_memory_grows_with_the_tokens(rule):
    def loss(*arrays):
        q, k, v, b = arrays
        if rule == "delta":
            return mx.square(gated_delta(q, k, v, -mx.square(b).sum(-1), b.sum(-1))[0]).sum()
        return mx.square(wkv7(None, q, mx.sigmoid(q), k, v, b, b, None)[0]).sum()

    def peak(tokens):
        return peak_of_gradients(loss, list(0.1 * mx.random.normal((4, 1, tokens, 1, 32))))

    assert peak(4096) < 2.4 * peak(2048)
