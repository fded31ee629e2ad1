"""The piecewise loss compared with autodiff through the model's complete logits."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.loss import masked_cross_entropy
from helpers.memory import peak_memory
from helpers.models import save_model
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tlora_mlx.data.batches import collate
from tlora_mlx.data.samples import Sample
from tlora_mlx.method import output_layer
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.calibration import calibrate
from tlora_mlx.method.layers import target_linears
from tlora_mlx.method.output_layer import (
    is_separable,
    losses_by_sample,
    summed_loss,
    target_rows,
)

SAMPLES = [
    Sample([(7 * i + 3 * n) % 300 for i in range(length)], first)
    for n, (length, first) in enumerate([(50, 3), (20, 10), (65, 60), (9, 1)])
]
BATCH = collate(SAMPLES, 2048)


def whole(model, tokens, targets):
    losses, counts = masked_cross_entropy(model(tokens[:, :-1]), tokens, targets)
    return losses.sum(), counts.sum()


def trained(path):
    """The model with one trained layer in its first block."""
    model = load_model(path)[0]
    model.freeze()
    model.layers[0].self_attn.v_proj.unfreeze()
    return model


def assert_equal(model, rows, separable, tolerance=1e-5):
    model.train()
    (loss, n), gradient = nn.value_and_grad(model, summed_loss)(model, *BATCH[:2], rows, separable)
    (expected, count), known = nn.value_and_grad(model, whole)(model, *BATCH[:2])
    assert n.item() == count.item() == sum(len(s.tokens) - s.first_target for s in SAMPLES)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for (_, a), (_, b) in zip(tree_flatten(gradient), tree_flatten(known), strict=True):
        assert mx.abs(b).max() > 0
        assert mx.abs(a - b).max() <= tolerance * mx.abs(b).max()


# gemma2 caps its logits and ties the output layer to the embedding.
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("piece", [2**21, 300 * 16])
def test_loss_and_gradient_equal_those_of_complete_logits(tmp_path, monkeypatch, family, piece):
    monkeypatch.setattr(output_layer, "PIECE", piece)
    monkeypatch.setattr(output_layer, "PIECE_ROWS", 16)
    model = trained(save_model(tmp_path, family))
    model.eval()
    assert is_separable(model, BATCH.tokens[:1])
    for separable in (True, False):
        for rows in (None, target_rows(BATCH)):
            assert_equal(model, rows, separable)
    model.eval()
    loss, _ = summed_loss(model, *BATCH[:2], target_rows(BATCH), True)
    assert loss.item() == pytest.approx(whole(model, *BATCH[:2])[0].item(), rel=1e-5)


def test_logits_are_not_picked_by_index(tmp_path):
    """That would copy a piece's logits, and add its gradient to an array of zeros as large."""
    model = trained(save_model(tmp_path)).train()
    gradient = nn.value_and_grad(model, summed_loss)(model, *BATCH[:2], None, True)
    mx.export_to_dot(str(tmp_path / "graph.dot"), *(a for _, a in tree_flatten(gradient)))
    graph = (tmp_path / "graph.dot").read_text()
    assert graph.count('"Gather"') == 1  # the embedding's rows
    assert "Scatter" not in graph


def test_half_precision(tmp_path):
    model = trained(save_model(tmp_path, dtype="bfloat16"))
    model.eval()
    assert is_separable(model, BATCH.tokens[:1])
    assert_equal(model, target_rows(BATCH), True, tolerance=0.03)


def test_a_nan_outside_the_counted_tokens_changes_nothing():
    states = mx.random.normal((8, 4))
    counts = mx.array([True] * 5 + [False] * 3)
    poisoned = mx.where(counts[:, None], states, mx.nan)
    weight = mx.random.normal((4, 10))
    labels = mx.arange(8)
    loss, gradient = output_layer._piece(poisoned @ weight, labels, counts)
    expected, clean = output_layer._piece(states[:5] @ weight, labels[:5], mx.ones(5, mx.bool_))
    assert loss.tolist() == pytest.approx([*expected.tolist(), 0, 0, 0], rel=1e-5)
    assert mx.allclose(gradient[:5], clean, atol=1e-5)
    assert (gradient[5:] == 0).all()


@pytest.mark.parametrize("separable", [True, False])
def test_losses_by_sample(tmp_path, monkeypatch, separable):
    """Whatever the pieces, each sample's own; none that counts gives 0."""
    monkeypatch.setattr(output_layer, "PIECE", 300 * 7)
    monkeypatch.setattr(output_layer, "PIECE_ROWS", 7)
    model = trained(save_model(tmp_path, "llama"))
    model.eval()
    batch = collate([*SAMPLES, Sample([1, 2, 3], 3)], 2048)
    losses, _ = masked_cross_entropy(model(batch.tokens[:, :-1]), *batch[:2])
    found = losses_by_sample(model, batch, separable)
    assert found == pytest.approx(losses.sum(axis=1).tolist(), rel=1e-5)
    assert found[-1] == 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_piece_in_double_precision(dtype):
    """From logits in half precision: the loss and its gradient."""
    random = np.random.default_rng(0)
    raw = mx.array(6 * random.standard_normal((9, 40))).astype(dtype)
    labels, counts = np.arange(9) * 3, np.arange(9) % 4 > 0
    loss, gradient = output_layer._piece(raw, mx.array(labels), mx.array(counts))
    exact = np.array(raw.astype(mx.float32), np.float64)
    shares = np.exp(exact) / np.exp(exact).sum(axis=1, keepdims=True)
    losses = -np.log(shares[range(9), labels]) * counts
    np.testing.assert_allclose(loss, losses, rtol=1e-5)
    expected = (shares - np.eye(40)[labels]) * counts[:, None]
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient.astype(mx.float32), expected, rtol=8e-3, atol=1e-6)


def test_the_gradient_of_a_multiple_of_the_loss():
    mx.random.seed(0)
    states, weight = mx.random.normal((6, 4)), mx.random.normal((4, 10))
    labels, counts = mx.arange(6), mx.ones(6, mx.bool_)

    def loss(states, factor):
        layer = output_layer._summed_cross_entropy
        return factor * layer(lambda x: x @ weight, states, labels, counts, True)

    once, thrice = (mx.grad(loss)(states, factor) for factor in (1.0, 3.0))
    assert mx.abs(once).max().item() > 0.1
    assert mx.allclose(thrice, 3 * once, rtol=1e-5).item()


def test_models_that_are_not_separable(tmp_path):
    model = trained(save_model(tmp_path))
    model.eval()
    tokens = BATCH.tokens[:1]

    model.lm_head.unfreeze()  # it would get no gradient
    assert not is_separable(model, tokens)
    model.lm_head.freeze()
    assert is_separable(model, tokens)

    class Mixing(type(model)):
        def __call__(self, inputs, cache=None):
            return mx.cumsum(super().__call__(inputs, cache), axis=1)

    model.__class__ = Mixing
    assert not is_separable(model, tokens)
    assert_equal(model, target_rows(BATCH), separable=False)

    class Raising(type(model)):
        def __call__(self, inputs, cache=None):
            return super().__call__(inputs, cache) * (1 + 0 / inputs.any().item())

    model.__class__ = Raising
    assert not is_separable(model, tokens)


def test_rows_cover_the_targets_in_few_sizes():
    sizes = set()
    for length in range(2, 66):
        batch = collate([Sample([1] * 65, 1), Sample([1] * 65, 66 - length + 1)], 65)
        targets = int(np.array(batch.counts).sum())
        assert targets <= target_rows(batch) <= 128
        sizes.add(target_rows(batch))
    assert len(sizes) <= output_layer.SHAPES


def peak_growth(model, run):
    """How many bytes more 1,024 positions take than 512: four pieces more, by MLX's counter.

    In short sequences, since attention takes memory by the square of their length. With no memory
    allowed, MLX on the CPU allocates no operation ahead of the one being computed; otherwise, up to
    ten, as many as the threads' timing has it.
    """

    def peak(sequences):
        tokens = mx.array(np.arange(65 * sequences).reshape(sequences, 65))
        counts = mx.array(np.arange(65) >= 1) & (tokens >= 0)
        mx.eval(model.parameters(), tokens, counts)
        return peak_memory(lambda: run(tokens, counts))

    limit = mx.set_memory_limit(0)
    try:
        peak(1)
        return peak(16) - peak(8)
    finally:
        mx.set_memory_limit(limit)


def test_calibration_does_not_keep_all_logits(tmp_path):
    """Nor does the mode matter that the model is in."""
    vocabulary = 20_000
    model = load_model(save_model(tmp_path / "wide", vocab_size=vocabulary, hidden_size=32))[0]
    model.eval()
    targets = target_linears(model)

    def calibrated(tokens, counts):
        lengths = mx.full(len(tokens), tokens.shape[1])
        calibrate(model, targets, [Batch(tokens, counts, lengths)])

    assert peak_growth(model, calibrated) < 2 * 4 * output_layer.PIECE_ROWS * vocabulary
    assert not model.training


def test_calibration_ignores_dropout_and_differentiates_in_training_mode(tmp_path):
    model = load_model(save_model(tmp_path / "model"))[0]
    batch = Batch(mx.arange(40)[None] % 9, mx.arange(40)[None] >= 1, mx.array([40]))
    without = calibrate(model, target_linears(model), [batch]).sensitivities
    modes = []

    class Norm(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.dropout = norm, nn.Dropout(0.9)

        def __call__(self, x):
            modes.append(self.training)
            return self.dropout(self.norm(x))

    model.model.norm = Norm(model.model.norm)
    assert calibrate(model, target_linears(model), [batch]).sensitivities == without
    assert modes[-1]


@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_peak_grows_by_the_activations_alone(tmp_path, with_gradient):
    """From four pieces to eight: by less than the logits of two."""
    vocabulary = 20_000
    model = trained(save_model(tmp_path / "wide", vocab_size=vocabulary, hidden_size=32))
    model.train(with_gradient)
    function = nn.value_and_grad(model, summed_loss) if with_gradient else summed_loss

    def computed(tokens, counts):
        mx.eval(function(model, tokens, counts, None, True))

    assert peak_growth(model, computed) < 2 * 4 * output_layer.PIECE_ROWS * vocabulary
