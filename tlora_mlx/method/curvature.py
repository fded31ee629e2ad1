"""The loss around each module's weights: its curvature, as two factors, and its slopes.

To second order, an error E in a module's weights W raises the loss by tr(O·E·I·Eᵀ)/2 (Kronecker
factors of the empirical Fisher information). Like sensitivities, the factors come out of the
backward pass as the "gradients" of parameters of a probe (``method.calibration``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
        gradient: the loss's, summed over all tokens, by W: (out, in) = Σ_t δ_t x_tᵀ.
    """

    inputs: mx.array
    outputs: mx.array
    gradient: mx.array

    def damped(self, share: float) -> tuple[mx.array, mx.array, float]:
        """I and O with mean diagonals of 1 and ``share`` added to them, and what divided them.

        Raises:
            ValueError: a factor is zero, or not finite.
        """
        found, divisor = [], 1.0
        for matrix in (self.inputs, self.outputs):
            mean = mx.diagonal(matrix).mean().item()
            if not (mean > 0 and mx.isfinite(matrix).all().item()):
                raise ValueError("the loss does not depend on it, or its gradient is not finite")
            found.append(matrix / mean + share * mx.eye(matrix.shape[0]))
            divisor *= mean
        mx.eval(found)
        return *found, divisor


class Tap(NamedTuple):
    """What a backward pass sums up at one module.

    Attributes:
        module: computes y (batch, T, out) from x (batch, T, in).
        zeros: the sums to start from.
        reduce: what a batch adds to them, given x (N, in) and δ (N, out) of all its tokens,
            float32.
    """

    module: nn.Module
    zeros: list[mx.array]
    reduce: Callable[[mx.array, mx.array], list[mx.array]]


class _Probe(nn.Module):
    """Computes what a tapped module computes, and its sums in the backward pass."""

    def __init__(self, name: str, tap: Tap, lengths: list[int]):
        super().__init__()
        self.module, self.sums = tap.module, tap.zeros
        self._name, self._lengths, self._reduce = name, lengths, tap.reduce
        self.module.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        lengths = self._lengths
        if x.ndim != 3 or x.shape[0] != len(lengths):
            raise ValueError(
                f"{self._name} gets inputs of shape {tuple(x.shape)}, not one row of tokens for "
                f"each of {len(lengths)} samples"
            )

        @mx.custom_function
        def tap(y, x, *sums):
            return y

        @tap.vjp
        def _(primals, delta, _output):
            x = primals[1]
            tokens = (
                mx.concatenate([part[n, :t] for n, t in enumerate(lengths)]).astype(mx.float32)
                for part in (x, delta)
            )
            return delta, mx.zeros_like(x), *self._reduce(*tokens)

        return tap(self.module(x), mx.stop_gradient(x), *self.sums)


def summed(
    model: nn.Module,
    taps: Mapping[str, Tap],
    batches: Iterable[Batch],
    advance: Advance = no_advance,
) -> tuple[float, dict[str, list[mx.array]]]:
    """Run the samples through the model once, forwards and backwards; weights stay untouched.

    Args:
        model: the model, adapters and all; it is frozen on return.
        taps: what is summed up, by the modules' full names.
        batches: as for ``calibrate``.
        advance: called with each finished batch's number of samples.

    Returns:
        The loss, summed over all samples' tokens, and each module's sums over them, evaluated.

    Raises:
        ValueError: a loss is not finite, or a module does not get its inputs sample by sample.
    """
    sums: dict[str, list[mx.array]] = {}
    plain = {name: tap.module for name, tap in taps.items()}
    total, samples, training = 0.0, 0, model.training
    model.freeze()
    separable = has_separable_output(model, plain)
    try:
        for batch in batches:
            lengths = batch.lengths.tolist()
            replace_modules(model, {n: _Probe(n, tap, lengths) for n, tap in taps.items()})
            loss, gradients = backward(model, batch, samples, separable)
            total += loss
            for name in reversed(taps):
                found = [gradients.pop(f"{name}.sums.{i}") for i in range(len(taps[name].zeros))]
                sums[name] = tree_map(mx.add, sums[name], found) if name in sums else found
                mx.eval(sums[name])
            samples += len(lengths)
            advance(len(lengths))
    finally:
        replace_modules(model, plain)
        model.train(training)
    return total, sums


def curvatures(
    model: nn.Module,
    modules: Mapping[str, tuple[nn.Module, tuple[int, int]]],
    batches: Iterable[Batch],
    advance: Advance = no_advance,
) -> tuple[float, dict[str, Curvature]]:
    """The loss, summed over all tokens, and each module's curvature, evaluated.

    The arguments are those of ``summed``.

    Args:
        modules: what is measured, by full name, with (out, in).

    Raises:
        ValueError: a loss is not finite.
    """

    def reduce(x: mx.array, delta: mx.array) -> list[mx.array]:
        weighted = x * mx.sqrt((delta * delta).sum(axis=1, keepdims=True))
        return [delta.T @ x, *gram_strips(weighted), *gram_strips(delta)]

    taps = {
        name: Tap(module, [mx.zeros(shape), *zero_strips(shape[1]), *zero_strips(shape[0])], reduce)
        for name, (module, shape) in modules.items()
    }
    loss, sums = summed(model, taps, batches, advance)
    factors = {}
    for name in list(sums):
        gradient, *strips = sums.pop(name)
        of_inputs = len(zero_strips(modules[name][1][1]))
        both = strips[:of_inputs], strips[of_inputs:]
        factors[name] = Curvature(*map(from_strips, both), gradient)
        mx.eval(factors[name])
    return loss, factors


def slopes(
    model: nn.Module,
    modules: Mapping[str, tuple[nn.Module, mx.array, int]],
    batches: Iterable[Batch],
    advance: Advance = no_advance,
) -> tuple[float, dict[str, list[mx.array]]]:
    """The loss and its gradient by the modules' scales and biases, where W = level · scale + bias.

    The other arguments are those of ``summed``.

    Args:
        modules: by full name, with its levels (out, in) and the number of groups in a row.

    Returns:
        The loss, summed over all tokens; its gradient by scales and biases, (out, groups) float32.

    Raises:
        ValueError: a loss is not finite.
    """

    def tap(module: nn.Module, levels: mx.array, groups: int) -> Tap:
        def reduce(x: mx.array, delta: mx.array) -> list[mx.array]:
            return by_scales_and_biases(delta.T @ x, levels, groups)

        return Tap(module, [mx.zeros((levels.shape[0], groups))] * 2, reduce)

    taps = {name: tap(*found) for name, found in modules.items()}
    return summed(model, taps, batches, advance)


def by_scales_and_biases(gradient: mx.array, levels: mx.array, groups: int) -> list[mx.array]:
    """A gradient by W (out, in) as that by its scales and biases, (out, groups) float32."""
    by_weight = gradient.reshape(gradient.shape[0], groups, -1)
    return [(by_weight * levels.reshape(by_weight.shape)).sum(-1), by_weight.sum(-1)]
