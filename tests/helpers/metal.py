"""A Mac's GPU, as far as mlx-lm's models can tell: its kernels are chosen, and have no gradient.

On a Mac it is the real one, with real kernels, whose launches are counted. Elsewhere each kernel is
replaced by plain operations that compute the same, in a function which, like MLX's
``CustomKernel``, has no gradient. Any other kernel is None on a CPU, or fails when it is launched.
"""

from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

import mlx.core as mx
import mlx_lm.generate  # noqa: F401 (it makes a stream on the default device)
from mlx_lm.models import gated_delta

from tlora_mlx.models.differentiable import wkv7


def delta_rule(*, inputs, output_dtypes, **_):
    q, k, v, g, beta, state, _tokens, *mask = inputs
    y, state = gated_delta.gated_delta_ops(q, k, v, g, beta, state, *mask)
    if mask:
        y = mx.where(mask[0][..., None, None], y, 0)
    return [y.astype(output_dtypes[0]), state.astype(output_dtypes[1])]


def sinkhorn(*, inputs, template, **_):
    comb, eps = inputs
    for step in range(2 * dict(template)["ITERS"] - 1):
        comb = comb / (comb.sum(axis=-1 if step % 2 else -2, keepdims=True) + eps)
    return [comb]


KERNELS = {
    "mlx_lm.models.gated_delta": {
        "_gated_delta_kernel": delta_rule,
        "_gated_delta_kernel_masked": delta_rule,
        "_gated_delta_kernel_vec": delta_rule,
        "_gated_delta_kernel_vec_masked": delta_rule,
        "_gated_delta_kernel_packed": delta_rule,
    },
    "mlx_lm.models.rwkv7": {"_wkv7_kernel": wkv7},
    "mlx_lm.models.deepseek_v41": {"_sinkhorn_kernel": sinkhorn},
}


def on_a_mac():
    return mx.metal.is_available() and mx.default_device() == mx.gpu


@contextmanager
def on_the_cpu():
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(device)


class Real:
    """A kernel, and its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __call__(self, **launch):
        self.launches += 1
        return self.kernel(**launch)


class StandIn:
    """Computes what ``function`` computes, without a gradient; counts its launches."""

    def __init__(self, function):
        self.function, self.launches = function, 0

    def __call__(self, *, inputs, output_shapes, output_dtypes, **launch):
        self.launches += 1
        arrays = [x for x in inputs if isinstance(x, mx.array)]

        @mx.custom_function
        def run(*arrays):
            found = iter(arrays)
            given = [next(found) if isinstance(x, mx.array) else x for x in inputs]
            outputs = self.function(inputs=given, output_dtypes=output_dtypes, **launch)
            assert [y.shape for y in outputs] == [tuple(shape) for shape in output_shapes]
            assert [y.dtype for y in outputs] == list(output_dtypes)
            return tuple(outputs)

        @run.vjp
        def _(*_):
            raise RuntimeError("[Primitive::vjp] Not implemented for CustomKernel.")

        return list(run(*arrays))


class Metal:
    """A Mac, or what stands in for one until ``monkeypatch`` undoes it."""

    def __init__(self, monkeypatch):
        self.kernels = []
        for path, kernels in KERNELS.items():
            if find_spec(path):  # an older mlx-lm has not all of them
                module = import_module(path)
                for name, function in kernels.items():
                    kernel = Real(vars(module).get(name)) if on_a_mac() else StandIn(function)
                    self.kernels.append(kernel)
                    monkeypatch.setattr(module, name, kernel, raising=False)
        if not on_a_mac():
            monkeypatch.setattr(mx.metal, "is_available", lambda: True)
            monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)

    def launches(self):
        return sum(kernel.launches for kernel in self.kernels)
