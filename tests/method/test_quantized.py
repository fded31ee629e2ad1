"""Quantized and half-precision bases: the statistics of the dequantized weights, in float32."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.memory import peak_memory
from helpers.subspaces import quality
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from tlora_mlx.data.batches import collate
from tlora_mlx.data.samples import Sample
from tlora_mlx.method.allocation import plan_ranks
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.calibration import calibrate
from tlora_mlx.method.covariance import input_leaders
from tlora_mlx.method.initialise import exact_subspaces
from tlora_mlx.method.layers import dense_weight, linear_shape, replace_modules, target_linears
from tlora_mlx.method.sensitivity import PIECE, mean_products

MODES = [("affine", bits) for bits in (2, 3, 4, 5, 6, 8)]
MODES += [("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4)]


def small_model(**settings):
    mx.random.seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **settings}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    return Model(ModelArgs(model_type="llama", rms_norm_eps=1e-5, **settings))


def some_batches(count=6, length=30):
    random = np.random.default_rng(1)
    lengths = random.integers(length // 2, length, count)
    samples = [Sample(random.integers(0, 100, n).tolist(), 5) for n in lengths]
    return [collate(samples[i : i + 3], 2048) for i in range(0, count, 3)]


def statistics(model, batches, rank=4):
    targets = target_linears(model)
    leaders = input_leaders(model, targets)
    calibration = calibrate(model, targets, batches, set(leaders.values()))
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    plan = plan_ranks(calibration.sensitivities, shapes, rank, rank)
    subspaces = exact_subspaces(plan, targets, leaders, calibration.covariances).a
    return calibration, plan, subspaces, leaders


@pytest.mark.parametrize(("mode", "bits"), MODES)
def test_the_plan_of_the_dequantized_model(mode, bits):
    quantized = small_model()
    linears = set(map(id, target_linears(quantized).values()))
    group_size = {"affine": 32, "nvfp4": 16}.get(mode, 32)
    nn.quantize(
        quantized, group_size, bits, mode=mode, class_predicate=lambda _, m: id(m) in linears
    )
    dequantized = small_model()
    dequantized.load_weights(
        [(k, v) for k, v in tree_flatten(quantized.parameters()) if "layers" not in k], strict=False
    )
    replaced = {}
    for name, module in target_linears(quantized).items():
        assert isinstance(module, nn.QuantizedLinear)
        out_features, in_features = linear_shape(module)
        replaced[name] = nn.Linear(in_features, out_features, bias=False)
        replaced[name].weight = dense_weight(module)
    replace_modules(dequantized, replaced)
    batches = some_batches()
    ours, plan, subspaces, leaders = statistics(quantized, batches)
    reference, expected, _, _ = statistics(dequantized, batches)
    for name, s in reference.sensitivities.items():
        assert ours.sensitivities[name] == pytest.approx(s, rel=1e-4)
        assert plan.modules[name].rank == expected.modules[name].rank
        assert plan.modules[name].scale == expected.modules[name].scale
    for name, a in subspaces.items():
        covariance = reference.covariances[leaders[name]]
        assert quality(replaced[name].weight, covariance, a)[0] > 0.9999


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.bfloat16, 0.05), (mx.float16, 0.01)])
def test_half_precision_bases_have_float32_statistics(dtype, tolerance):
    """Activations near float16's limit, whose squares are far above it, and tiny gradients."""

    def model(dtype):
        model = small_model()
        for block in model.layers:
            # Large inputs to the attention and MLP, weights that bring them down again.
            for norm, modules in (
                (block.input_layernorm, [block.self_attn[f"{k}_proj"] for k in "qkv"]),
                (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj]),
            ):
                norm.weight = norm.weight * 4096.0
                for module in modules:
                    module.weight = module.weight / 4096.0
        model.set_dtype(dtype)
        return model

    batches = some_batches()
    half, _, subspaces, _ = statistics(model(dtype), batches)
    full, _, _, _ = statistics(model(mx.float32), batches)
    largest = max(mx.abs(c).max().item() for c in half.covariances.values())
    assert 65504 < largest < np.inf
    for name, s in full.sensitivities.items():
        assert half.sensitivities[name] == pytest.approx(s, rel=tolerance)
    assert all(a.dtype == mx.float32 and mx.isfinite(a).all().item() for a in subspaces.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.bfloat16, 0.02), (mx.float16, 0.004)])
def test_massive_activations_in_half_precision(dtype, tolerance):
    """A first token that is huge in two directions, and a feature that is large everywhere.

    As in real models (Sun and others, "Massive Activations in Large Language Models", arXiv
    2402.17762).
    """

    def model(final):
        model = small_model()
        embeddings = model.model.embed_tokens.weight
        embeddings[0, 5], embeddings[0, 40] = 3000.0, -1500.0
        for block in model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[5], norm.weight[7] = 0.02, 60.0
        model.set_dtype(dtype)  # the same weights, whatever they are computed with
        model.set_dtype(final)
        return model

    batches = [
        Batch(
            mx.pad(mx.maximum(tokens, 1), [(0, 0), (1, 0)]),
            mx.pad(counts, [(0, 0), (1, 0)]),
            lengths + 1,
        )
        for tokens, counts, lengths in some_batches()
    ]
    half, plan, subspaces, leaders = statistics(model(dtype), batches)
    full, expected, _, _ = statistics(model(mx.float32), batches)
    eigenvalues = np.linalg.eigvalsh(np.array(full.covariances["model.layers.0.self_attn.q_proj"]))
    assert eigenvalues[-1] > 1e4
    linears = target_linears(model(mx.float32))
    for name, s in full.sensitivities.items():
        assert half.sensitivities[name] == pytest.approx(s, rel=4 * tolerance), name
        assert plan.modules[name].rank == expected.modules[name].rank
    for name, covariance in full.covariances.items():
        error = np.array(half.covariances[name] - covariance)
        assert np.linalg.norm(error) <= tolerance * np.linalg.norm(np.array(covariance)), name
    for name, a in subspaces.items():
        covariance = full.covariances[leaders[name]]
        assert quality(dense_weight(linears[name]), covariance, a)[0] > 0.999


def test_gradients_of_large_weights_are_formed_in_pieces(monkeypatch):
    model, batches = small_model(), some_batches()
    targets = target_linears(model)
    whole = calibrate(model, targets, batches)
    assert PIECE > 64 * 128
    monkeypatch.setattr("tlora_mlx.method.sensitivity.PIECE", 1000)
    pieces = calibrate(model, targets, batches)
    for name, s in whole.sensitivities.items():
        assert pieces.sensitivities[name] == pytest.approx(s, rel=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_peak_memory_of_the_sensitivities(quantized):
    """Above the model: activations plus a few of the largest weight matrices, by MLX's counter."""
    model = small_model(hidden_size=512, intermediate_size=1536, num_hidden_layers=8)
    if quantized:
        nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    targets = target_linears(model)
    (batch,) = some_batches(count=3, length=30)
    largest = 4 * max(out * rows for out, rows in map(linear_shape, targets.values()))
    all_weights = 4 * sum(out * rows for out, rows in map(linear_shape, targets.values()))
    # What a training step keeps for its backward pass, without any gradient of a weight.
    tokens = batch.tokens.size
    activations = 4 * tokens * (8 * (10 * 512 + 6 * 1536) + 4 * 100)
    peak = peak_memory(lambda: calibrate(model, targets, [batch]))
    assert peak < activations + 4 * largest
    assert activations + 4 * largest < 0.6 * all_weights  # not all gradients at once


def test_sensitivities_of_a_large_matrix_do_not_drift():
    """Against float64, at a size where one float32 sum over the matrix is 2.8e-3 too low."""
    random = np.random.default_rng(0)
    linear = nn.Linear(2048, 2048, bias=False)
    delta, x = (random.standard_normal((7, 2048)).astype(np.float32) for _ in range(2))
    found = mean_products(linear, [(mx.array(delta), mx.array(x))]).item()
    weight = np.array(linear.weight, np.float64)
    expected = np.abs(weight * (delta.astype(np.float64).T @ x.astype(np.float64))).mean()
    assert found == pytest.approx(expected, rel=1e-5)
