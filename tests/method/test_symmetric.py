import mlx.core as mx
import numpy as np
import pytest

from tlora_mlx.method.symmetric import STRIPS, from_strips, gram_strips, unit_of, zero_strips


@pytest.mark.parametrize("width", [1, 3, 4, 64, 67])
def test_a_gram_matrix_in_strips(width):
    x = np.random.default_rng(0).standard_normal((50, width)).astype(np.float32)
    strips = gram_strips(mx.array(x))
    assert len(strips) == min(width, STRIPS)
    assert [strip.shape for strip in strips] == [strip.shape for strip in zero_strips(width)]
    whole = np.array(from_strips(strips))
    np.testing.assert_allclose(whole, x.T @ x, atol=1e-4)
    assert unit_of(mx.array(whole)).item() == np.abs(whole).max()
    assert unit_of(mx.zeros((width, width))).item() == 1
    assert np.array_equal(whole - np.tril(whole, -1), np.triu(whole))
    if width == 64:
        assert sum(strip.size for strip in strips) == width**2 * 5 / 8
