"""The loss without all logits: the output layer is applied to a few target positions at a time.

With a large vocabulary the logits of a batch are the largest array of a step, in training and in
calibration, and many of them are not needed: those for prompt and padding. Since the loss and
gradient of a position do not depend on other positions, a piece's gradient is computed right after
its loss, and its logits are dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tlora_mlx.method.batch import Batch

# The logits in memory at a time: this many entries, but enough rows for an efficient product.
PIECE = 2**19
PIECE_ROWS = 64

# The number of positions used to test whether the output layer can be applied separately.
PROBE_TOKENS = 8

# The number of shapes for each batch size: each of them is compiled, and kept.
SHAPES = 4

OutputLayer = Callable[[mx.array], mx.array]


class _BodyStandIn:
    """Replaces a model's body: returns ``states`` whatever it is called with."""

    def __init__(self, body: nn.Module, states: mx.array):
        self._body, self._states = body, states

    def __call__(self, *args: object, **kwargs: object) -> mx.array:
        return self._states

    def __getattr__(self, name: str) -> object:  # a tied output layer is part of the body
        return getattr(self._body, name)


def apply_output_layer(model: nn.Module, states: mx.array) -> mx.array:
    """The model's logits for its body's states (batch, T, hidden), computed by its own code.

    So scaling, soft-capping and tied embeddings are right for every family.
    """
    # An instance attribute hides the submodule of that name without changing the module tree.
    vars(model)["model"] = _BodyStandIn(model.model, states)
    try:
        return model(mx.zeros(states.shape[:2], mx.int32))
    finally:
        del vars(model)["model"]


def is_separable(model: nn.Module, tokens: mx.array) -> bool:
    """Whether the output layer can be applied to selected positions, after ``model.model``.

    This is tested: on every second of the first positions it must give the model's own logits.
    All trained parameters must be inside ``model.model``.

    Args:
        model: in evaluation mode.
        tokens: (1, T) token ids.
    """
    tokens = tokens[:, :PROBE_TOKENS]
    body = getattr(model, "model", None)
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    if not isinstance(body, nn.Module) or not all(n.startswith("model.") for n in trained):
        return False
    try:
        logits = model(tokens)[:, ::2]
        separate = apply_output_layer(model, body(tokens)[:, ::2])
        if separate.shape != logits.shape:
            return False
        # Rounding depends on the number of rows, on an M5 (TF32) even for float32; a different
        # function would differ by far more.
        tolerance = max(1e-2, 4 * mx.finfo(logits.dtype).eps) * mx.abs(logits).max()
        return bool((mx.abs(separate - logits).max() <= tolerance).item())
    except Exception:  # the model's code, called in an unusual way, may raise anything: then no
        return False


def target_rows(batch: Batch) -> int:
    """How many positions to compute the loss for: all that count, rounded up to few shapes."""
    positions = batch.tokens[:, 1:].size
    step = -(-positions // SHAPES)
    return min(positions, step * -(-int(np.array(batch.counts).sum()) // step))


def summed_loss(
    model: nn.Module,
    tokens: mx.array,
    counts: mx.array,
    rows: int | None = None,
    separable: bool = False,
) -> tuple[mx.array, mx.array]:
    """The loss summed over the tokens that count, and their number; both scalars, float32.

    It is computed in float32, whatever the logits' dtype. Nothing after the body gets a gradient.

    Args:
        model: in training mode the gradient is computed with the loss, otherwise only the loss.
        tokens: (batch, T) token ids, padded on the right.
        counts: (batch, T) bool: which tokens count as targets; the first never does.
        rows: how many positions to compute the loss for, at least those that count; None: all.
        separable: the result of ``is_separable`` for the model.
    """
    counts = counts[:, 1:].flatten()
    states, output_layer = _states(model, tokens[:, :-1], separable)
    labels, chosen = tokens[:, 1:].flatten(), counts
    if rows is not None and rows < labels.size:
        order = mx.argsort(mx.where(counts, 0, 1))[:rows]  # those that count come first
        states, labels, chosen = states[order], labels[order], counts[order]
    loss = _summed_cross_entropy(output_layer, states, labels, chosen, model.training)
    return loss, counts.sum().astype(mx.float32)


def losses_by_sample(model: nn.Module, batch: Batch, separable: bool) -> list[float]:
    """Each sample's loss, summed over its tokens that count; 0 where none does.

    Args:
        model: in evaluation mode.
        batch: its tokens and which of them count.
        separable: the result of ``is_separable`` for the model.
    """
    counts = np.array(batch.counts)[:, 1:]
    positions = np.flatnonzero(counts)
    sums = np.zeros(len(counts))
    if not positions.size:
        return sums.tolist()
    states, output_layer = _states(model, batch.tokens[:, :-1], separable)
    labels, places = batch.tokens[:, 1:].flatten(), mx.array(positions)
    states, labels, own = states[places], labels[places], positions // counts.shape[1]
    step = _piece_rows(output_layer(states[:1]).shape[-1])
    for start in range(0, len(labels), step):
        piece = slice(start, start + step)
        every = mx.ones(labels[piece].shape, mx.bool_)
        losses, _ = _piece(output_layer(states[piece]), labels[piece], every)
        np.add.at(sums, own[piece], np.array(losses))
    return sums.tolist()


def _states(model: nn.Module, tokens: mx.array, separable: bool) -> tuple[mx.array, OutputLayer]:
    """What comes before the logits of all positions, (batch · T, n), and what makes them logits."""
    if not separable:
        return model(tokens).flatten(0, 1), lambda logits: logits
    states = model.model(tokens).flatten(0, 1)
    return states, lambda states: apply_output_layer(model, states[None]).squeeze(0)


def _piece_rows(vocabulary: int) -> int:
    """How many rows of logits to have in memory at a time."""
    return max(PIECE_ROWS, PIECE // vocabulary)


def _summed_cross_entropy(
    output_layer: OutputLayer,
    states: mx.array,
    labels: mx.array,
    counts: mx.array,
    with_gradient: bool,
) -> mx.array:
    """Σ cross-entropy over the rows of ``states`` (n, hidden) that count, piece by piece."""
    # Only the shape: it is never evaluated.
    step = _piece_rows(output_layer(states[:1]).shape[-1])
    detached = mx.stop_gradient(states) if with_gradient else states
    losses, gradients = [], []
    for start in range(0, len(labels), step):
        piece = slice(start, start + step)
        x = detached[piece]
        if losses:  # finish the previous piece first, so that its logits are freed
            x = mx.depends(x, [losses[-1], *gradients[-1:]])
        loss, by_logits = _piece(output_layer(x), labels[piece], counts[piece])
        losses.append(loss.sum())
        if with_gradient:
            gradients.append(mx.vjp(output_layer, [x], [by_logits])[1][0])
    total = sum(losses)
    if not with_gradient:
        return total
    gradient = mx.concatenate(gradients) if len(gradients) > 1 else gradients[0]

    @mx.custom_function
    def known(states, total, gradient):
        return total

    @known.vjp
    def _(primals, cotangent, _output):
        _, total, gradient = primals
        return cotangent.astype(gradient.dtype) * gradient, mx.zeros_like(total), gradient * 0

    return known(states, total, mx.stop_gradient(gradient))


def _piece(raw: mx.array, labels: mx.array, counts: mx.array) -> tuple[mx.array, mx.array]:
    """Losses (n,), float32, and the gradient of their sum by the logits ``raw`` (n, vocabulary).

    Even a NaN in a row that does not count stays out. Both share one exponential.
    """
    logits = raw.astype(mx.float32)
    largest = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    powers = mx.exp(logits - largest)
    norms = powers.sum(axis=-1, keepdims=True)
    own = mx.take_along_axis(logits, labels[:, None], axis=-1)
    losses = mx.where(counts, (mx.log(norms) + largest - own).squeeze(-1), 0.0)
    is_own = mx.arange(logits.shape[-1]) == labels[:, None]
    by_logits = mx.where(counts[:, None], powers / norms - is_own, 0.0).astype(raw.dtype)
    return losses, by_logits
