"""mlx-lm's kernels have no gradient; its models have one while we differentiate them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.metal import Metal, on_the_cpu
from helpers.models import save_model
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta, rwkv7

from tlora_mlx.models.base_model import load_base_model
from tlora_mlx.models.differentiable import differentiable, differentiable_operations

TOKENS = mx.arange(30)[None] % 19


def gradients(model, *inputs):
    def loss(model):
        return mx.square(model(*inputs)[..., ::3]).sum()

    found = nn.value_and_grad(model, loss)(model)[1]
    mx.eval(found)
    return dict(tree_flatten(found))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, ours in found.items():
        ours, theirs = np.array(ours), np.array(expected[name])
        assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max(), name


def test_a_models_gradient_is_that_of_mlx_lms_loop(tmp_path, monkeypatch):
    """Without us, a model in evaluation mode has none on a Mac."""
    model = load_base_model(str(save_model(tmp_path / "model", "qwen3_next"))).model
    with on_the_cpu():
        expected = gradients(model, TOKENS)
    metal = Metal(monkeypatch)
    with pytest.raises(RuntimeError, match="Not implemented for CustomKernel"):
        gradients(model, TOKENS)
    launches = metal.launches()
    assert launches > 0
    with differentiable(model):
        assert_same(gradients(model, TOKENS), expected)
    assert metal.launches() == launches
    assert not model.training


def test_rwkv7_uses_its_kernel_in_training_too(monkeypatch):
    mx.random.seed(0)
    ranks = dict.fromkeys(["a", "v", "gate", "decay"], 4)
    settings = {f"{name}_low_rank_dim": rank for name, rank in ranks.items()}
    model = rwkv7.Model(rwkv7.ModelArgs("rwkv7", 20, 64, 64, 1e-5, 32, 2, **settings))
    # mlx-lm makes its norms and shifts as zeros.
    model.apply(lambda p: p + 0.1 * mx.random.normal(p.shape))
    with on_the_cpu():
        expected = gradients(model, TOKENS)
    Metal(monkeypatch)
    model.train()
    with pytest.raises(RuntimeError, match="Not implemented for CustomKernel"):
        gradients(model, TOKENS)
    with differentiable(model):
        assert_same(gradients(model, TOKENS), expected)


def test_hyper_connections_use_their_kernel_in_training_too(monkeypatch):
    deepseek = pytest.importorskip("mlx_lm.models.deepseek_v41")
    mx.random.seed(0)
    layer = deepseek.HyperConnection(deepseek.ModelArgs(hidden_size=8, hc_mult=4))
    layer.fn, streams = mx.random.normal(layer.fn.shape), mx.random.normal((1, 3, 4, 8))

    def mixed(streams):
        return sum((part * part).sum() for part in layer(streams))

    with on_the_cpu():
        expected = mx.grad(mixed)(streams)
        mx.eval(expected)
    Metal(monkeypatch)
    with pytest.raises(RuntimeError, match="Not implemented for CustomKernel"):
        mx.grad(mixed)(streams)
    with differentiable(layer):
        assert_same({"": mx.grad(mixed)(streams)}, {"": expected})


def test_what_was_replaced_comes_back():
    original = gated_delta.gated_delta_update
    with pytest.raises(KeyError), differentiable_operations():
        raise KeyError(gated_delta.gated_delta_update is original)
    assert gated_delta.gated_delta_update is original
