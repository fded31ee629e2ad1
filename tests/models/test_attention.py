"""Causal attention in chunks: the values and gradients of mlx-lm's, in less memory."""

import mlx.core as mx
import pytest
from helpers.gradients import assert_like_mlx_lm, peak_of_gradients
from mlx_lm.models import base

from tlora_mlx.models.attention import CHUNK, MOST_CHUNKS, causal_attention

SCALE = 8**-0.5


def inputs(tokens, keys=None):
    """Queries, keys and values of 4 heads, two to a key head; values narrower, as in MLA."""
    mx.random.seed(0)
    shapes = [(2, 4, tokens, 8), (2, 2, keys or tokens, 8), (2, 2, keys or tokens, 6)]
    return [2 * mx.random.normal(shape) for shape in shapes]


@pytest.mark.parametrize("tokens", [1, CHUNK, CHUNK + 1, 3 * CHUNK - 1, CHUNK * MOST_CHUNKS + 90])
def test_values_and_gradients_are_mlx_lms(tokens):
    def outputs(*arrays):
        return [base.scaled_dot_product_attention(*arrays, None, SCALE, "causal")]

    assert_like_mlx_lm(outputs, inputs(tokens))


def test_sinks_are_scores_of_every_chunk():
    def outputs(sinks, *arrays):
        return [base.scaled_dot_product_attention(*arrays, None, SCALE, "causal", sinks)]

    assert_like_mlx_lm(outputs, [mx.array([3.0, -1.0, 0.0, 2.0]), *inputs(2 * CHUNK)])


@pytest.mark.parametrize("keys", [None, 3 * CHUNK])
def test_other_masks_are_left_to_mlx(keys):
    """A window's array, none at all, and keys of earlier tokens."""
    arrays, window = (
        inputs(2 * CHUNK, keys),
        mx.random.bernoulli(0.5, (2 * CHUNK, keys or 2 * CHUNK)),
    )
    for mask in (window, None, "causal"):
        whole = mx.fast.scaled_dot_product_attention(*arrays, scale=SCALE, mask=mask)
        found = causal_attention(*arrays, None, SCALE, mask)
        assert mx.allclose(found, whole, atol=1e-5)


def test_memory_is_what_the_scores_below_the_diagonal_take():
    """Of 4 chunks, 10 sixteenths of the scores are kept."""
    arrays = inputs(4 * CHUNK)

    def loss(attention):
        return lambda *arrays: mx.square(attention(*arrays, None, SCALE, "causal")).sum()

    ours, whole = (
        peak_of_gradients(loss(f), arrays)
        for f in (causal_attention, base.scaled_dot_product_attention)
    )
    assert ours < 0.8 * whole
