"""The method compared with the output of the authors' code on a small Llama (tests/golden)."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.paths import GOLDEN
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tlora_mlx.data.batches import collate
from tlora_mlx.data.samples import Sample
from tlora_mlx.method import calibration as calibration_module
from tlora_mlx.method.allocation import plan_ranks
from tlora_mlx.method.calibration import calibrate
from tlora_mlx.method.covariance import centred_rows, input_leaders
from tlora_mlx.method.layers import dense_weight, linear_shape, target_linears
from tlora_mlx.method.sensitivity import mean_products
from tlora_mlx.method.subspace import task_subspace

CASES = ["expected_r4_a4", "expected_r6_a12"]


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "model")[0]


@pytest.fixture(scope="module")
def samples():
    rows = json.loads((GOLDEN / "samples.json").read_text())
    return [Sample(row["ids"], row["prompt_tokens"]) for row in rows]


def calibrate_in_batches(model, samples, size):
    batches = [collate(samples[i : i + size], 512) for i in range(0, len(samples), size)]
    targets = target_linears(model)
    leaders = input_leaders(model, targets)
    calibration = calibrate(model, targets, batches, set(leaders.values()))
    covariances = {name: calibration.covariances[leaders[name]] for name in targets}
    return replace(calibration, covariances=covariances)


@pytest.fixture(scope="module")
def calibration(model, samples):
    return calibrate_in_batches(model, samples, 5)


@pytest.fixture(params=CASES)
def expected(request):
    numbers = json.loads((GOLDEN / f"{request.param}.json").read_text())
    return numbers, mx.load(str(GOLDEN / f"{request.param}.safetensors"))


def relative(value, reference):
    return (mx.abs(value - reference).max() / mx.abs(reference).max()).item()


def test_sensitivities(calibration, expected):
    modules = expected[0]["modules"]
    assert calibration.sensitivities.keys() == modules.keys()
    for name, module in modules.items():
        assert calibration.sensitivities[name] == pytest.approx(module["sensitivity"], rel=1e-4)


def test_covariances(calibration, expected):
    keys = [key for key in expected[1] if key.startswith("cov.")]
    assert len(keys) == 7
    for key in keys:
        assert relative(calibration.covariances[key.removeprefix("cov.")], expected[1][key]) < 1e-5


def test_ranks_and_scales(model, calibration, expected):
    numbers = expected[0]
    shapes = {name: linear_shape(module) for name, module in target_linears(model).items()}
    plan = plan_ranks(calibration.sensitivities, shapes, numbers["rank"], numbers["alpha"])
    for name, module in numbers["modules"].items():
        assert plan.modules[name].rank == module["rank"], name
        assert plan.modules[name].scale == module["scale"], name


def test_task_subspaces(model, calibration, expected):
    numbers, tensors = expected
    targets = target_linears(model)
    compared = 0
    for name, module in numbers["modules"].items():
        rank, singular_values = module["rank"], module["singular_values"]
        if rank == 0:
            continue
        weight, covariance = dense_weight(targets[name]), calibration.covariances[name]
        a = task_subspace(weight, covariance, rank)
        assert relative(a @ a.T, mx.eye(rank)) < 1e-5
        captured = mx.square(weight @ covariance @ a.T).sum().item()
        best = sum(value**2 for value in singular_values[:rank])
        assert captured / best > 0.9999, name
        # The projector is only determined where the next singular value is clearly smaller.
        if len(singular_values) > rank and singular_values[rank] < 0.99 * singular_values[rank - 1]:
            theirs = tensors[f"A.{name}"]
            assert mx.abs(a.T @ a - theirs.T @ theirs).max().item() < 1e-3, name
            compared += 1
    assert compared > 15


@pytest.mark.parametrize("size", [2, 3, 12])
def test_a_batch_gives_the_same_as_its_samples_one_by_one(model, samples, size):
    one_by_one = calibrate_in_batches(model, samples, 1)
    batched = calibrate_in_batches(model, samples, size)
    assert batched.samples == one_by_one.samples == len(samples)
    for name, value in one_by_one.sensitivities.items():
        assert batched.sensitivities[name] == pytest.approx(value, rel=2e-6)
        assert relative(batched.covariances[name], one_by_one.covariances[name]) < 2e-6


def test_padding_has_no_effect(model, samples):
    batch = collate(samples[:4], 512)
    positions = mx.arange(batch.tokens.shape[1])
    noisy = mx.where(positions < batch.lengths[:, None], batch.tokens, (positions * 7 + 3) % 128)
    targets = target_linears(model)
    clean = calibrate(model, targets, [batch], targets)
    changed = calibrate(model, targets, [batch._replace(tokens=noisy)], targets)
    assert changed.sensitivities == clean.sensitivities
    for name, covariance in clean.covariances.items():
        assert mx.array_equal(covariance, changed.covariances[name]), name


def test_the_prompt_is_masked(model, samples):
    unmasked = [sample._replace(first_target=1) for sample in samples]
    targets = target_linears(model)
    masked_result = calibrate(model, targets, [collate(samples, 512)], targets)
    unmasked_result = calibrate(model, targets, [collate(unmasked, 512)], targets)
    for name, value in masked_result.sensitivities.items():
        assert abs(unmasked_result.sensitivities[name] / value - 1) > 1e-3
        # The inputs are taken on all tokens either way.
        covariance = masked_result.covariances[name]
        assert relative(unmasked_result.covariances[name], covariance) < 1e-6


def test_the_model_is_unchanged_afterwards(model, samples):
    before = dict(model.named_modules())
    tokens = mx.array([samples[0].tokens])
    logits = model(tokens)
    model.unfreeze()
    calibrate_in_batches(model, samples, 4)
    assert not tree_flatten(model.trainable_parameters())
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is module for name, module in before.items())
    assert mx.array_equal(model(tokens), logits)


def test_modules_that_read_the_same_input_share_a_covariance(model, samples):
    targets = target_linears(model)
    leaders = input_leaders(model, targets)
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert [leaders[f"{attention}.{kind}_proj"] for kind in "qkvo"] == [
        *[f"{attention}.q_proj"] * 3,
        f"{attention}.o_proj",
    ]
    assert leaders[f"{mlp}.up_proj"] == leaders[f"{mlp}.gate_proj"] == f"{mlp}.gate_proj"
    assert len(set(leaders.values())) == 4 * 3
    # What is shared is the same: each module's own covariance is its leader's.
    own = calibrate(model, targets, [collate(samples, 512)], targets).covariances
    assert all(mx.array_equal(own[name], own[leader]) for name, leader in leaders.items())


def test_the_last_module_is_evaluated_first(model, samples, monkeypatch):
    """So that the backward pass frees what it no longer needs, module by module."""
    names, observe = [], calibration_module._observe

    def watched(*arguments):
        for found in observe(*arguments):
            names.append(found[0])
            yield found

    monkeypatch.setattr(calibration_module, "_observe", watched)
    targets = target_linears(model)
    calibrate(model, targets, [collate(samples[:2], 512)])
    assert names == list(reversed(targets))


def test_no_samples(model):
    with pytest.raises(ValueError, match="no sample"):
        calibrate(model, target_linears(model), [])


def test_a_loss_that_is_not_finite_names_its_samples(model, samples, monkeypatch):
    batches = [collate(samples[:3], 512), collate(samples[3:4], 512)]
    norm = model.model.norm
    monkeypatch.setattr(
        type(norm), "__call__", lambda self, x: x * (mx.nan if len(x) == 1 and self is norm else 1)
    )
    with pytest.raises(ValueError, match="loss is not finite on calibration samples 4 to 4"):
        calibrate(model, target_linears(model), batches)
    assert not tree_flatten(model.trainable_parameters())
    assert isinstance(model.layers[0].mlp.up_proj, nn.Linear)


def test_statistics_are_float32_before_the_first_operation():
    """From half-precision inputs whose sums and products half precision does not have."""
    random = np.random.default_rng(0)
    for dtype in (mx.float16, mx.bfloat16):
        x = mx.array(300 + random.standard_normal((40, 12))).astype(dtype)
        delta = mx.array(300 * random.standard_normal((40, 9))).astype(dtype)
        linear = nn.Linear(12, 9, bias=False)
        linear.set_dtype(dtype)
        exact = {
            k: np.array(v.astype(mx.float32), np.float64)
            for k, v in (("x", x), ("delta", delta), ("weight", linear.weight))
        }
        rows = exact["x"] - exact["x"].mean(axis=0)
        found = centred_rows(mx.stack([x, x]), [40, 30])
        np.testing.assert_allclose(found[:40], rows, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found[40:].mean(axis=0), np.zeros(12), atol=1e-3)
        assert found.shape == (70, 12)
        expected = np.abs(exact["weight"] * (exact["delta"].T @ exact["x"])).mean()
        assert mean_products(linear, [(delta, x)]).item() == pytest.approx(expected, rel=1e-5)
