"""One pass over task samples: covariance and sensitivity of every target module.

Both statistics come out of the backward pass as the "gradients" of two small parameters of a probe
that stands in for each target module: the probe's custom gradient rule sees the module's inputs X
and output gradients δ, reduces them per sample, and passes δ on unchanged. So no gradient of a
weight is ever formed for more than one module and sample at a time, weights that have no gradient
(quantized ones) need none, and gradient checkpointing works as it does in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tlora_mlx.method.covariance import centred_gram
from tlora_mlx.method.layers import dense_weight, linear_shape, replace_modules
from tlora_mlx.method.loss import masked_cross_entropy


class Batch(NamedTuple):
    """Samples padded on the right to one length.

    Attributes:
        tokens: (batch, T) int32 token ids.
        spans: (batch, 2) int32: the first position that counts as a target (after the prompt, where
            it is masked), and the sample's length.
    """

    tokens: mx.array
    spans: mx.array


@dataclass(frozen=True)
class Calibration:
    """What the samples say of each target module, by full name.

    Attributes:
        sensitivities: s = 1/N Σ_n mean_ij |W_ij · ∂loss_n/∂W_ij|.
        covariances: C (in, in) float32; modules that read the same input share one array.
        samples: N, how many samples were counted.
    """

    sensitivities: dict[str, float]
    covariances: dict[str, mx.array]
    samples: int


class _Probe(nn.Module):
    """Computes what ``linear`` computes, and in the backward pass the two statistics.

    ``sensitivity`` (batch,) and ``covariance`` (in, in) are parameters that have no effect on the
    output; their gradients are the batch's statistics. A module that reads the same input as one
    before it leaves the covariance to that one (``leaders`` holds who that is).
    """

    def __init__(self, name: str, linear: nn.Module, leaders: dict[str, str]):
        super().__init__()
        self.linear = linear
        self.linear.freeze()
        self._name = name
        self._leaders = leaders

    def prepare(self, lengths: list[int], seen: dict[int, tuple[mx.array, str]]) -> None:
        """Set up for a batch whose samples have these lengths; ``seen`` is shared by all probes."""
        in_features = linear_shape(self.linear)[1]
        self.sensitivity = mx.zeros((len(lengths),))
        self.covariance = mx.broadcast_to(mx.array(0.0), (in_features, in_features))
        self._lengths = lengths
        self._seen = seen

    def __call__(self, x: mx.array) -> mx.array:
        lengths = self._lengths
        if x.ndim != 3 or x.shape[0] != len(lengths):
            raise NotImplementedError(
                f"{self._name} sees inputs of shape {tuple(x.shape)}, not one row of tokens for "
                f"each of {len(lengths)} samples, so it cannot be calibrated"
            )
        # Identity of the Python object tells who reads the same input; keeping x in `seen` for the
        # forward pass keeps its id from being used again.
        _, leader = self._seen.setdefault(id(x), (x, self._name))
        self._leaders[self._name] = leader
        linear, leads = self.linear, leader == self._name

        @mx.custom_function
        def tap(y, x, sensitivity, covariance):
            return y

        @tap.vjp
        def _(primals, delta, _output):
            _, x, _, covariance = primals
            weight = dense_weight(linear)
            rows = [(delta[n, :t], x[n, :t]) for n, t in enumerate(lengths)]
            scores = [
                mx.abs(weight * (d.astype(mx.float32).T @ r.astype(mx.float32))).mean()
                for d, r in rows
            ]
            gram = sum(centred_gram(r) for _, r in rows) if leads else covariance
            return delta, mx.zeros_like(x), mx.stack(scores), gram

        return tap(linear(x), mx.stop_gradient(x), self.sensitivity, self.covariance)


def calibrate(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    on_batch: Callable[[int], None] = lambda samples: None,
) -> Calibration:
    """Run the samples through the model once, forwards and backwards; weights stay untouched.

    A batch gives exactly what its samples give one by one, and padding contributes nothing. Inputs
    are taken on all tokens of a sample, the last one included; the loss is each sample's own mean.

    Args:
        model: the base model; it is frozen on return.
        targets: the modules to look at, by full name, as ``target_linears`` finds them.
        batches: every sample with at least one token that counts as a target.
        on_batch: called with the number of samples of each batch that is done.

    Raises:
        ValueError: there is no sample, or a loss is not finite (the message counts the samples).
        NotImplementedError: a target module does not see its inputs sample by sample.

    Source: paper, section 3; Rambo-Yi/TLora e3463ae, ``tlora.py::preprocess_tlora``.
    """
    leaders: dict[str, str] = {}
    probes = {name: _Probe(name, linear, leaders) for name, linear in targets.items()}
    sensitivities = dict.fromkeys(targets, 0.0)
    covariances: dict[str, mx.array] = {}
    samples = 0
    model.freeze()
    replace_modules(model, probes)
    try:
        for batch in batches:
            for name, scores, gram in _observe(model, probes, batch, samples):
                sensitivities[name] += sum(scores.tolist())
                if leaders[name] == name:
                    covariances[name] = covariances.get(name, 0.0) + gram
                    mx.eval(covariances[name])
            samples += batch.tokens.shape[0]
            on_batch(batch.tokens.shape[0])
    finally:
        replace_modules(model, targets)
        model.freeze()
    if samples == 0:
        raise ValueError("there is no sample to calibrate on")
    covariances = {name: covariance / samples for name, covariance in covariances.items()}
    mx.eval(covariances)
    return Calibration(
        {name: s / samples for name, s in sensitivities.items()},
        {name: covariances[leaders[name]] for name in targets},
        samples,
    )


def _observe(
    model: nn.Module, probes: Mapping[str, _Probe], batch: Batch, samples_before: int
) -> Iterator[tuple[str, mx.array, mx.array]]:
    """One batch's statistics, module by module: name, scores (batch,) and gram (in, in).

    The last module comes first and each result is dropped before the next is evaluated, so that
    the backward pass frees what it no longer needs: evaluated together, MLX keeps it all.
    """
    seen: dict[int, tuple[mx.array, str]] = {}
    lengths = batch.spans[:, 1].tolist()
    for probe in probes.values():
        probe.prepare(lengths, seen)
        probe.unfreeze(recurse=False)

    def summed_loss(model: nn.Module) -> mx.array:
        losses, counts = masked_cross_entropy(model(batch.tokens), *batch)
        return (losses.sum(axis=1) / counts).sum()

    loss, tree = nn.value_and_grad(model, summed_loss)(model)
    seen.clear()
    gradients = dict(tree_flatten(tree))
    del tree
    if not mx.isfinite(loss).item():
        raise ValueError(
            "the base model's loss is not finite on calibration samples "
            f"{samples_before + 1} to {samples_before + len(lengths)}"
        )
    for name in reversed(probes):
        scores = gradients.pop(f"{name}.sensitivity")
        gram = gradients.pop(f"{name}.covariance")
        mx.eval(scores)
        yield name, scores, gram
