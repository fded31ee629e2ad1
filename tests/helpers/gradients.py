"""Gradients of mlx-lm's own loops and of what replaces them: the same values, in less memory."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from helpers.memory import peak_memory
from tlora_mlx.models.differentiable import differentiable_operations


def assert_like_mlx_lm(outputs, arguments):
    """The same outputs, and gradients of a random weighting of them by every argument.

    Args:
        outputs: computes a list of arrays, by mlx-lm's code.
        arguments: arrays, or trees of arrays.
    """

    def loss(*arguments):
        mx.random.seed(0)
        return sum((mx.random.normal(z.shape) * z).sum() for z in outputs(*arguments))

    def results():
        gradients = mx.grad(loss, argnums=list(range(len(arguments))))(*arguments)
        return dict(tree_flatten([outputs(*arguments), *gradients]))

    expected = results()
    with differentiable_operations():
        found = results()
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        ours, theirs = np.array(found[name]), np.array(theirs)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), name


def peak_of_gradients(loss, arrays):
    """Bytes that the loss's gradients by these arrays take at most, beside the arrays."""
    mx.eval(arrays)
    gradients = mx.grad(loss, argnums=list(range(len(arrays))))
    return peak_memory(lambda: mx.eval(gradients(*arrays)))
