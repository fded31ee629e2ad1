"""Griffin's recurrence, compared with mlx-lm's loop and with transformers."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.gradients import assert_like_mlx_lm, peak_of_gradients
from mlx.utils import tree_flatten
from mlx_lm.models import recurrent_gemma
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

from tlora_mlx.models.differentiable import differentiable_operations

WIDTH, HEADS = 12, 3


def layer():
    found = recurrent_gemma.RGLRU(WIDTH, HEADS)
    found.apply(lambda p: mx.random.normal(p.shape))
    return found


@pytest.mark.parametrize(("tokens", "continued"), [(1, True), (1, False), (64, True), (150, False)])
def test_like_mlx_lm(tokens, continued):
    """Outputs, state, and every gradient."""
    mx.random.seed(tokens)
    lru, x = layer(), mx.random.normal((2, tokens, WIDTH))
    state = [mx.random.normal((2, WIDTH))] if continued else []

    def outputs(parameters, *arrays):
        lru.update(parameters)
        return list(lru(*arrays))

    assert_like_mlx_lm(outputs, [lru.trainable_parameters(), x, *state])


def test_gates_that_are_rounded_to_1():
    """The normalizer's root has an infinite gradient there in mlx-lm, a bounded one here."""
    mx.random.seed(0)
    lru, x = layer(), mx.random.normal((2, 20, WIDTH))
    lru.recurrent_param = mx.where(mx.arange(WIDTH) % 3 == 0, -20.0, lru.recurrent_param)
    theirs = RecurrentGemmaRglru(
        RecurrentGemmaConfig(hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=1)
    )
    theirs.load_state_dict(
        {name: torch.tensor(np.array(p)) for name, p in tree_flatten(lru.parameters())}
    )

    def gradients():
        def loss(parameters, x):
            lru.update(parameters)
            return mx.square(lru(x)[0]).sum()

        return mx.grad(loss, argnums=[0, 1])(lru.trainable_parameters(), x)

    assert not all(mx.isfinite(g).all() for _, g in tree_flatten(gradients()))
    with differentiable_operations():
        found = dict(tree_flatten(gradients()))
    inputs = torch.tensor(np.array(x), requires_grad=True)
    theirs(inputs, torch.arange(20)[None]).square().sum().backward()
    expected = {f"0.{name}": p.grad for name, p in theirs.named_parameters()} | {"1": inputs.grad}
    # 1 − a² is a difference of nearly equal numbers.
    for name, gradient in expected.items():
        ours, gradient = np.array(found[name]), gradient.numpy()
        assert np.abs(ours - gradient).max() <= 1e-3 * np.abs(gradient).max(), name


def test_the_gradients_memory_grows_with_the_tokens():
    """mlx-lm's loop keeps an array of all tokens for each token."""
    lru = layer()

    def peak(tokens):
        x = mx.random.normal((1, tokens, WIDTH))
        mx.eval(x, lru.parameters())
        with differentiable_operations():
            return peak_of_gradients(lambda x: mx.square(lru(x)[0]).sum(), [x])

    assert peak(2048) < 3 * peak(1024)
