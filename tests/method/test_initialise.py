"""Both ways to the task subspaces, on the included example's activations and on a wide model."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from helpers.memory import peak_memory
from helpers.paths import EXAMPLE
from helpers.subspaces import quality
from mlx_lm.models.llama import Model, ModelArgs

from tlora_mlx import TrainConfig
from tlora_mlx.data.batches import collate
from tlora_mlx.data.samples import Sample
from tlora_mlx.method import initialise
from tlora_mlx.method.allocation import plan_ranks
from tlora_mlx.method.calibration import calibrate
from tlora_mlx.method.covariance import exact_bytes, groups_within, input_leaders
from tlora_mlx.method.layers import dense_weight, linear_shape, target_linears
from tlora_mlx.training.planning import calibration_batches
from tlora_mlx.training.setup import prepare


def example():
    config = TrainConfig(
        model=str(EXAMPLE / "model"), data=str(EXAMPLE / "data"), calibration_samples=24
    )
    setup = prepare(config)
    return setup.base.model, setup.targets, calibration_batches(config, setup.data["train"])


def wide():
    """A random, wide model: its covariances have slowly decaying spectra."""
    mx.random.seed(0)
    settings = {"hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 500}
    model = Model(ModelArgs(model_type="llama", rms_norm_eps=1e-5, **settings))
    random = np.random.default_rng(0)
    samples = [Sample(random.integers(0, 500, 60).tolist(), 10) for _ in range(12)]
    batches = [collate(samples[i : i + 4], 2048) for i in range(0, 12, 4)]
    return model, target_linears(model), batches


def narrow_and_deep():
    """A model whose covariances need more memory than anything else."""
    settings = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    settings |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 100}
    model = Model(ModelArgs(model_type="llama", rms_norm_eps=1e-5, **settings))
    mx.eval(model.parameters())
    random = np.random.default_rng(0)
    samples = [Sample(random.integers(0, 100, 20).tolist(), 5) for _ in range(2)]
    return model, target_linears(model), [collate([sample], 2048) for sample in samples]


@cache
def prepared(which):
    model, targets, batches = {"example": example, "wide": wide}[which]()
    leaders = input_leaders(model, targets)
    calibration = calibrate(model, targets, batches, set(leaders.values()))
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    plan = plan_ranks(calibration.sensitivities, shapes, 4, 4)
    return model, targets, batches, leaders, calibration.covariances, plan


@pytest.mark.parametrize("which", ["example", "wide"])
@pytest.mark.parametrize("way", ["exact", "grouped", "streamed"])
def test_captured_energy(which, way):
    model, targets, batches, leaders, covariances, plan = prepared(which)
    if way == "exact":
        subspaces = initialise.exact_subspaces(plan, targets, leaders, covariances).a
    elif way == "grouped":
        memory = exact_bytes(targets, leaders.values()) // 3
        arguments = (model, plan, targets, leaders, batches, memory)
        subspaces = initialise.grouped_subspaces(*arguments).a
    else:
        subspaces = initialise.streamed_subspaces(model, plan, targets, leaders, batches, seed=0)
    assert subspaces.keys() == plan.adapted().keys()
    for name, a in subspaces.items():
        assert a.shape == (plan.modules[name].rank, plan.modules[name].in_features)
        weight = dense_weight(targets[name])
        captured, distance = quality(weight, covariances[leaders[name]], a)
        assert captured > 0.9999, name
        assert distance < 1e-5


def test_peak_memory_of_each_way():
    """Above the model, by MLX's counter: a budget and its scratch space, not all covariances."""
    model, targets, batches = narrow_and_deep()
    leaders = input_leaders(model, targets)
    calibration = calibrate(model, targets, batches)
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    plan = plan_ranks(calibration.sensitivities, shapes, 2, 2)
    whole = exact_bytes(targets, leaders.values())
    largest = 4 * max(in_features for _, in_features in shapes.values()) ** 2
    memory = whole // 6
    arguments = (model, plan, targets, leaders, batches)

    def peak(run, *more):
        return peak_memory(lambda: run(*arguments, *more))

    # A covariance in the making, one scaled, and the activations of a batch.
    assert peak(initialise.grouped_subspaces, memory) < memory + 3 * largest < 0.7 * whole
    assert peak(initialise.streamed_subspaces, 0) < 3 * initialise.streamed_bytes(plan) < whole


def test_groups_keep_within_the_memory():
    _, targets, _, leaders, _, _ = prepared("example")
    size = exact_bytes(targets, leaders.values())
    # Per block: 128² for q, k, v; 128² for o; 128² for gate and up; 352² for down.
    assert size == 4 * 4 * (3 * 128**2 + 352**2)
    assert groups_within(targets, leaders.values(), size) == [list(dict.fromkeys(leaders.values()))]
    groups = groups_within(targets, leaders.values(), size // 4)
    assert all(exact_bytes(targets, group) <= size // 4 for group in groups)
    assert [name for group in groups for name in group] == list(dict.fromkeys(leaders.values()))
    assert len(groups_within(targets, leaders.values(), 1)) == 16
