"""The curvature of the loss at each module's weights, as two factors: of its inputs and outputs.

To second order, an error E in a module's weights W raises the loss by tr(O·E·I·Eᵀ)/2 (Kronecker
factors of the empirical Fisher information). Like sensitivities, the factors come out of the
backward pass as the "gradients" of parameters of a probe (``method.calibration``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from tlora_mlx.method.batch import Batch
from tlora_mlx.method.calibration import backward, has_separable_output
from tlora_mlx.method.layers import replace_modules
from tlora_mlx.method.symmetric import from_strips, gram_strips, zero_strips
from tlora_mlx.observer import Advance, no_advance


class Curvature(NamedTuple):
    """The factors of one module, float32, symmetric; δ is the loss's gradient by the outputs y.

    Attributes:
        inputs: I (in, in) = Σ_t |δ_t|² x_t x_tᵀ, of the inputs that the loss depends on most.
        outputs: O (out, out) = Σ_t δ_t δ_tᵀ, the directions of y that it depends on.
    """

    inputs: mx.array
    outputs: mx.array

    def damped(self, share: float) -> tuple[Curvature, float]:
        """With mean diagonals of 1 and ``share`` added to them, and the factor this divided by.

        Raises:
            ValueError: a factor is zero, or not finite.
        """
        found, divisor = [], 1.0
        for matrix in self:
            mean = mx.diagonal(matrix).mean().item()
            if not (mean > 0 and mx.isfinite(matrix).all().item()):
                raise ValueError("the loss does not depend on it, or its gradient is not finite")
            found.append(matrix / mean + share * mx.eye(matrix.shape[0]))
            divisor *= mean
        mx.eval(found)
        return Curvature(*found), divisor


class _CurvatureProbe(nn.Module):
    """Computes what ``module`` computes, and the factors' strips in the backward pass."""

    def __init__(self, module: nn.Module, shape: tuple[int, int], lengths: list[int]):
        super().__init__()
        self.module = module
        self.outputs, self.inputs = (zero_strips(size) for size in shape)
        self._lengths = lengths
        self.module.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        lengths = self._lengths

        @mx.custom_function
        def tap(y, x, *strips):
            return y

        @tap.vjp
        def _(primals, delta, _output):
            x = primals[1]
            ds, xs = (
                mx.concatenate([part[n, :t] for n, t in enumerate(lengths)]).astype(mx.float32)
                for part in (delta, x)
            )
            weighted = xs * mx.sqrt((ds * ds).sum(axis=1, keepdims=True))
            return delta, mx.zeros_like(x), *gram_strips(weighted), *gram_strips(ds)

        y = self.module(x)
        return tap(y, mx.stop_gradient(x), *self.inputs, *self.outputs)


def curvatures(
    model: nn.Module,
    modules: Mapping[str, tuple[nn.Module, tuple[int, int]]],
    batches: Iterable[Batch],
    advance: Advance = no_advance,
) -> dict[str, Curvature]:
    """Run the samples through the model once, forwards and backwards; weights stay untouched.

    Args:
        model: the model, adapters and all; it is frozen on return.
        modules: what is measured, by full name, with (out, in).
        batches: as for ``calibrate``.
        advance: called with each finished batch's number of samples.

    Returns:
        Each module's factors, evaluated, summed over all samples' tokens.

    Raises:
        ValueError: a loss is not finite.
    """
    sums: dict[str, dict[str, list[mx.array]]] = {}
    plain = {name: module for name, (module, _) in modules.items()}
    samples, training = 0, model.training
    model.freeze()
    separable = has_separable_output(model, plain)
    try:
        for batch in batches:
            lengths = batch.lengths.tolist()
            probes = {
                name: _CurvatureProbe(module, shape, lengths)
                for name, (module, shape) in modules.items()
            }
            replace_modules(model, probes)
            gradients = backward(model, batch, samples, separable)
            for name in reversed(probes):
                found = {
                    part: [
                        gradients.pop(f"{name}.{part}.{i}")
                        for i in range(len(getattr(probes[name], part)))
                    ]
                    for part in ("inputs", "outputs")
                }
                sums[name] = tree_map(mx.add, sums[name], found) if name in sums else found
                mx.eval(sums[name])
            samples += len(lengths)
            advance(len(lengths))
    finally:
        replace_modules(model, plain)
        model.train(training)
    factors = {}
    for name in list(sums):
        parts = sums.pop(name)
        factors[name] = Curvature(from_strips(parts["inputs"]), from_strips(parts["outputs"]))
        mx.eval(factors[name])
    return factors
