"""One pass over task samples: each target module's sensitivity and, if requested, covariance.

Both statistics come out of the backward pass as the "gradients" of two small parameters of a probe
that replaces each target module: the probe's custom gradient rule sees the module's inputs X and
output gradients δ, reduces them per sample, and passes δ on unchanged. So weight gradients are
formed for only one module and sample at a time, weights without a gradient (quantized ones) need
none, and gradient checkpointing works as it does in training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from tlora_mlx.distributed.collectives import total
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.covariance import centred_rows
from tlora_mlx.method.experts import is_switch, modules_of, samples_of
from tlora_mlx.method.layers import Linear, linear_shape, replace_modules
from tlora_mlx.method.output_layer import PROBE_TOKENS, is_separable, summed_loss, target_rows
from tlora_mlx.method.sensitivity import mean_products, mean_products_of_experts
from tlora_mlx.method.symmetric import from_strips, gram_strips, zero_strips
from tlora_mlx.models.differentiable import differentiable
from tlora_mlx.observer import Advance, no_advance


@dataclass(frozen=True)
class Calibration:
    """The target modules' statistics over the samples, by full name.

    Attributes:
        sensitivities: s = 1/N Σ_n mean_ij |W_ij · ∂loss_n/∂W_ij|.
        covariances: C (in, in) float32, of the requested modules.
        samples: N, the number of samples.
    """

    sensitivities: dict[str, float]
    covariances: dict[str, mx.array]
    samples: int


class _Probe(nn.Module):
    """Computes what ``linear`` computes, and the statistics in the backward pass.

    ``sensitivity`` (batch,) and, if collected, ``covariance`` (strips of (in, in)) are parameters
    that have no effect on the output; their gradients are the batch's statistics.
    """

    def __init__(self, name: str, linear: nn.Module, collects: bool):
        super().__init__()
        self.linear = linear
        self.linear.freeze()
        self._name = name
        self._collects = collects

    def prepare(self, lengths: list[int]) -> None:
        """Set up for a batch whose samples have these lengths."""
        self._lengths = lengths
        self.sensitivity = mx.zeros((len(lengths),))
        if self._collects:
            self.covariance = zero_strips(linear_shape(self.linear)[1])
        self.unfreeze(recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        linear, lengths, collects = self.linear, self._lengths, self._collects
        if x.ndim != 3 or x.shape[0] != len(lengths):
            raise NotImplementedError(
                f"{self._name} gets inputs of shape {tuple(x.shape)}, not one row of tokens for "
                f"each of {len(lengths)} samples, so it cannot be calibrated"
            )

        @mx.custom_function
        def tap(y, x, *statistics):
            return y

        @tap.vjp
        def _(primals, delta, _output):
            x = primals[1]
            rows = [(delta[n, :t], x[n, :t]) for n, t in enumerate(lengths)]
            gradients = [mean_products(linear, rows)]
            if collects:
                gradients += gram_strips(centred_rows(x, lengths))
            return delta, mx.zeros_like(x), *gradients

        statistics = [self.sensitivity, *(self.covariance if collects else ())]
        return tap(linear(x), mx.stop_gradient(x), *statistics)


class _SwitchProbe(nn.Module):
    """Like ``_Probe``, for a stacked layer of experts: ``sensitivity`` (E,) of one sample."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        self.linear.freeze()

    def prepare(self, lengths: list[int]) -> None:
        """Set up for a batch of one sample."""
        self.sensitivity = mx.zeros((self.linear.num_experts,))
        self.unfreeze(recurse=False)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        linear = self.linear

        @mx.custom_function
        def tap(y, x, indices, sensitivity):
            return y

        @tap.vjp
        def _(primals, delta, _output):
            x, indices = primals[1:3]
            scores = mean_products_of_experts(linear, delta, x, indices.astype(mx.uint32))
            return delta, mx.zeros_like(x), mx.zeros_like(indices), scores

        # As float32, since every input of a custom function gets a gradient.
        routing = mx.stop_gradient(indices.astype(mx.float32))
        y = linear(x, indices, sorted_indices=sorted_indices)
        return tap(y, mx.stop_gradient(x), routing, self.sensitivity)


def calibrate(
    model: nn.Module,
    targets: Mapping[str, Linear],
    batches: Iterable[Batch],
    covariance_of: Collection[str] = (),
    advance: Advance = no_advance,
) -> Calibration:
    """Run the samples through the model once, forwards and backwards; weights stay untouched.

    A batch gives exactly what its samples give one by one, and padding contributes nothing. All
    tokens of a sample count as inputs, including the last; the loss is each sample's own mean.
    Under ``mlx.launch`` each process passes its own samples, and all get the total statistics.

    Args:
        model: the base model; it is frozen on return.
        targets: the modules to measure, by full name, as ``target_linears`` finds them.
        batches: every sample has at least one token that counts as a target.
        covariance_of: the targets whose covariance is requested, never experts; one for each input
            is enough (``covariance.input_leaders``).
        advance: called with each finished batch's number of samples.

    Returns:
        The sensitivities of all targets, and the covariances (in, in), float32, evaluated.

    Raises:
        ValueError: there is no sample, or a loss is not finite (the message gives the samples'
            numbers).
        NotImplementedError: a target module does not get its inputs sample by sample.

    Source: paper, section 3; Rambo-Yi/TLora e3463ae, ``tlora.py::preprocess_tlora``.
    """
    modules = modules_of(targets)
    probes = {
        name: _SwitchProbe(module)
        if is_switch(module)
        else _Probe(name, module, name in covariance_of)
        for name, module in modules.items()
    }
    if any(isinstance(probe, _SwitchProbe) for probe in probes.values()):
        batches = samples_of(batches)
    sensitivities = dict.fromkeys(targets, 0.0)
    grams = {name: zero_strips(linear_shape(targets[name])[1]) for name in covariance_of}
    samples, training = 0, model.training
    model.freeze()
    separable = has_separable_output(model, targets)
    replace_modules(model, probes)
    try:
        for batch in batches:
            for name, scores, strips in _observe(model, probes, batch, samples, separable):
                if is_switch(modules[name]):
                    for number, score in enumerate(scores.tolist()):
                        sensitivities[f"{name}.{number}"] += score
                    continue
                sensitivities[name] += sum(scores.tolist())
                if strips:
                    grams[name] = tree_map(mx.add, grams[name], strips)
                    mx.eval(grams[name])
            samples += batch.tokens.shape[0]
            advance(batch.tokens.shape[0])
    finally:
        replace_modules(model, modules)
        model.train(training)
    samples = int(total(mx.array(samples)).item())
    if samples == 0:
        raise ValueError("there is no sample to calibrate on")
    sums = total(mx.array(list(sensitivities.values()))).tolist()
    covariances: dict[str, mx.array] = {}
    for name in targets:
        if name in covariance_of:
            covariances[name] = total(from_strips(grams.pop(name))) / samples
            mx.eval(covariances[name])
    return Calibration(
        {name: s / samples for name, s in zip(targets, sums, strict=True)}, covariances, samples
    )


def has_separable_output(model: nn.Module, targets: Collection[str]) -> bool:
    """Whether the loss can be computed without all logits; the model is in evaluation mode then."""
    model.eval()
    return all(name.startswith("model.") for name in targets) and is_separable(
        model, mx.arange(PROBE_TOKENS)[None]
    )


def _observe(
    model: nn.Module,
    probes: Mapping[str, _Probe | _SwitchProbe],
    batch: Batch,
    samples_before: int,
    separable: bool,
) -> Iterator[tuple[str, mx.array, list[mx.array]]]:
    """One batch's statistics, module by module: name, scores (batch,), and a gram's strips or none.

    A stacked layer's scores are its experts', (E,), for a batch of one sample.

    The last module comes first and each result is dropped before the next is evaluated, so that the
    backward pass frees what it no longer needs; evaluated together, MLX would keep it all.
    """
    lengths = batch.lengths.tolist()
    for probe in probes.values():
        probe.prepare(lengths)
    _, gradients = backward(model, batch, samples_before, separable)
    counts = batch.counts[:, 1:].sum(axis=1).astype(mx.float32)
    for name in reversed(probes):
        scores = gradients.pop(f"{name}.sensitivity") / counts
        keys = [key for key in gradients if key.startswith(f"{name}.covariance.")]
        strips = [gradients.pop(key) for key in keys]
        mx.eval(scores)
        yield name, scores, strips


def backward(
    model: nn.Module, batch: Batch, samples_before: int, separable: bool
) -> tuple[float, dict[str, mx.array]]:
    """A batch's summed loss, and its gradients by the parameters' names, not evaluated.

    Args:
        model: with probes in it, everything else frozen.
        batch: the samples.
        samples_before: how many came before, for the message.
        separable: ``has_separable_output``.

    Raises:
        ValueError: the loss is not finite.
    """
    # The loss has no use for the last token, but the statistics of the inputs have.
    padded = Batch(
        mx.pad(batch.tokens, [(0, 0), (0, 1)]),
        mx.pad(batch.counts, [(0, 0), (0, 1)]),
        batch.lengths,
    )
    rows = target_rows(padded)

    def loss_of(model: nn.Module) -> mx.array:
        # Summed over a sample's tokens: a mean's gradients would underflow in float16. The scores
        # are divided by the number of tokens after the backward pass.
        return summed_loss(model, padded.tokens, padded.counts, rows, separable)[0]

    with differentiable(model):
        loss, tree = nn.value_and_grad(model, loss_of)(model)
    if not mx.isfinite(loss).item():
        raise ValueError(
            "the base model's loss is not finite on calibration samples "
            f"{samples_before + 1} to {samples_before + batch.tokens.shape[0]}"
        )
    return loss.item(), dict(tree_flatten(tree))
