"""Experts as separate modules, compared with the gradients of the stacked weights."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.loss import masked_cross_entropy
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear

from tlora_mlx.method import sensitivity
from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.calibration import calibrate
from tlora_mlx.method.covariance import accumulate, input_leaders
from tlora_mlx.method.experts import Expert, TLoRASwitchLinear
from tlora_mlx.method.layers import (
    adapter_tensors,
    adapters_off,
    attach,
    dense_weight,
    linear_shape,
    restore_b,
    target_linears,
    trained_parameters,
)
from tlora_mlx.method.sensitivity import mean_products

EXPERTS, WIDTH, HIDDEN = 5, 32, 64


class Block(nn.Module):
    """A router that never takes the last expert, and the others."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=True)
        self.switch_mlp = SwitchGLU(WIDTH, HIDDEN, EXPERTS, bias=True)
        self.gate.bias = mx.array([0.0] * (EXPERTS - 1) + [-1e4])

    def __call__(self, x):
        scores = mx.softmax(self.gate(x), axis=-1)
        indices = mx.stop_gradient(mx.argpartition(-scores, kth=1, axis=-1)[..., :2])
        weights = mx.take_along_axis(scores, indices, axis=-1)
        return x + (self.switch_mlp(x, indices) * weights[..., None]).sum(axis=-2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        self.layers = [Block(), Block()]
        self.head = nn.Linear(WIDTH, 40)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make(quantized=False):
    mx.random.seed(1)
    model = Model()
    if quantized:
        nn.quantize(model, 32, 4, class_predicate=lambda _, m: hasattr(m, "num_experts"))
    mx.eval(model.parameters())
    return model


# Below 64 rows mlx-lm leaves the tokens as they are; from there on it sorts them by expert.
LENGTHS = [9, 40, 21]


def batches():
    random = np.random.default_rng(0)
    tokens = np.zeros((3, 40), np.int32)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[:length] = random.integers(1, 40, length)
    positions, lengths = np.arange(40), np.array(LENGTHS)
    counts = (positions >= 2) & (positions < lengths[:, None])
    parts = (slice(0, 2), slice(2, 3))
    return [
        Batch(*(mx.array(array[part]) for array in (tokens, counts, lengths))) for part in parts
    ]


def samples():
    for tokens, counts, lengths in batches():
        for row, targets, length in zip(tokens, counts, lengths.tolist(), strict=True):
            yield row[None, :length], targets[None, :length]


def test_targets_are_every_expert_and_no_router():
    targets = target_linears(make(), experts=True)
    assert len(targets) == 2 * 3 * EXPERTS
    assert all(isinstance(target, Expert) for target in targets.values())
    assert "layers.1.switch_mlp.up_proj.4" in targets
    ups = target_linears(make(), 1, ["up_proj"], experts=True)
    assert list(ups) == [f"layers.1.switch_mlp.up_proj.{e}" for e in range(EXPERTS)]
    with pytest.raises(ValueError, match="no linear layer"):
        target_linears(make())
    with pytest.raises(ValueError, match="its linear layers are down_proj, gate_proj, up_proj"):
        target_linears(make(), suffixes=["gate"], experts=True)


def test_sensitivities_are_those_of_the_weights_gradients():
    model = make()
    found = calibrate(model, target_linears(model, experts=True), batches())
    assert found.samples == 3
    model = make()
    stacked = [f"layers.{n}.switch_mlp" for n in (0, 1)]
    expected = dict.fromkeys(found.sensitivities, 0.0)
    for tokens, span in samples():

        def loss(model, tokens=tokens, span=span):
            return masked_cross_entropy(model(tokens), tokens, span)[0].sum() / span.sum()

        gradients = nn.value_and_grad(model, loss)(model)[1]
        for n, name in enumerate(stacked):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                weight = model.layers[n].switch_mlp[projection].weight
                gradient = gradients["layers"][n]["switch_mlp"][projection]["weight"]
                for e, s in enumerate(mx.abs(weight * gradient).mean(axis=(1, 2)).tolist()):
                    expected[f"{name}.{projection}.{e}"] += s / 3
    assert expected["layers.0.switch_mlp.up_proj.4"] == 0
    for name, s in expected.items():
        assert found.sensitivities[name] == pytest.approx(s, rel=1e-4), name


def test_covariances_are_of_the_tokens_routed_to_an_expert():
    model = make()
    targets = target_linears(model, 2, ["up_proj"], experts=True)
    first = {name: target for name, target in targets.items() if name.startswith("layers.0.")}
    found = accumulate(model, first, batches(), lambda _, x: x.T @ x)
    expected = np.zeros((EXPERTS, WIDTH, WIDTH))
    for tokens, _ in samples():
        x = model.embed(tokens)[0]
        indices = mx.argpartition(-model.layers[0].gate(x), kth=1, axis=-1)[:, :2]
        for e in range(EXPERTS):
            rows = np.array(x)[(np.array(indices) == e).any(axis=1)]
            if len(rows):
                centred = rows - rows.mean(axis=0)
                expected[e] += centred.T @ centred / 3
    assert np.abs(expected[:4]).max(axis=(1, 2)).min() > 0.1
    for e in range(EXPERTS):
        got = np.array(found[f"layers.0.switch_mlp.up_proj.{e}"])
        np.testing.assert_allclose(got, expected[e], atol=1e-4)


def test_gate_and_up_of_an_expert_share_their_input():
    model = make()
    targets = target_linears(model, experts=True)
    leaders = input_leaders(model, targets)
    name = "layers.0.switch_mlp"
    assert leaders[f"{name}.up_proj.3"] == leaders[f"{name}.gate_proj.3"]
    assert leaders[f"{name}.down_proj.3"] == f"{name}.down_proj.3"
    assert len(set(leaders.values())) == 2 * 2 * EXPERTS


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_of_experts_are_dense_updates_of_their_weights(quantized):
    """Differing ranks, including 0, on both sides of mlx-lm's sorting."""
    model, dense = make(quantized), make()
    modules, tensors = {}, {}
    targets = target_linears(model, experts=True)
    for i, (name, target) in enumerate(targets.items()):
        out_features, in_features = linear_shape(target)
        rank = [0, 3, 1, 7][i % 4]
        modules[name] = ModulePlan(rank, 0.5 + i / 8, 1.0, out_features, in_features)
        weight = dense_weight(target)
        if rank:
            a, b = mx.random.normal((in_features, rank)), mx.random.normal((rank, out_features))
            tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": 0.1 * b}
            weight = weight + modules[name].scale * 0.1 * (a @ b).T
        stack, number = name.rsplit(".", 1)
        dict(dense.named_modules())[stack].weight[int(number)] = weight
    plan = RankPlan(4, 4, modules)
    base = model(batches()[0].tokens)
    attach(model, plan, tensors)
    for tokens, *_ in [*batches(), (mx.array([[3, 4]]), None)]:
        np.testing.assert_allclose(
            np.array(model(tokens)), np.array(dense(tokens)), atol=2e-4, rtol=1e-4
        )
    got = adapter_tensors(model)
    assert got.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert mx.array_equal(got[key], tensor).item(), key
    assert trained_parameters(model) == plan.trained_parameters()
    with adapters_off(model):
        assert mx.array_equal(model(batches()[0].tokens), base).item()
    zeros = {k: mx.zeros_like(v) for k, v in got.items() if k.endswith(".lora_b")}
    restore_b(model, zeros)
    assert mx.abs(model(batches()[0].tokens) - base).max().item() < 1e-6


def test_training_leaves_the_padding_at_zero():
    model = make()
    plan, tensors = {}, {}
    for i, (name, target) in enumerate(target_linears(model, experts=True).items()):
        out_features, in_features = linear_shape(target)
        plan[name] = ModulePlan(1 + i % 3, 1.0, 1.0, out_features, in_features)
        tensors[f"{name}.lora_a"] = mx.random.normal((in_features, 1 + i % 3))
    attach(model, RankPlan(2, 2, plan), tensors)
    tokens, counts, _ = batches()[0]

    def loss(model):
        return masked_cross_entropy(model(tokens), tokens, counts)[0].sum()

    gradients = nn.value_and_grad(model, loss)(model)[1]
    assert {name.split(".")[-1] for name, _ in tree_flatten(gradients)} == {"lora_b"}
    b = gradients["layers"][0]["switch_mlp"]["up_proj"]["lora_b"]
    ranks = [plan[f"layers.0.switch_mlp.up_proj.{e}"].rank for e in range(EXPERTS)]
    for e, rank in enumerate(ranks):
        assert mx.abs(b[e, rank:]).sum().item() == 0
        assert (mx.abs(b[e, :rank]).sum().item() > 0) == (e < EXPERTS - 1)


def test_a_b_below_float16s_range(monkeypatch):
    """B is scaled before it is rounded to the products' dtype: 1e-8 alone would be 0 there."""
    product = mx.gather_mm  # on the CPU it takes only float32

    def in_half_precision(x, weights, **options):
        y = product(x.astype(mx.float32), weights.astype(mx.float32), **options)
        return y.astype(weights.dtype)

    monkeypatch.setattr(mx, "gather_mm", in_half_precision)
    b = mx.full((1, 4), 1e-8)
    layer = TLoRASwitchLinear(
        SwitchLinear(4, 4, 2, bias=False), mx.float16, {1: (mx.ones((4, 1)), 1e6, b)}
    )
    layer.linear.weight = mx.zeros((2, 4, 4), mx.float16)
    y = layer(mx.ones((1, 1, 4), mx.float16), mx.array([1]))
    assert mx.allclose(y, mx.full((1, 1, 4), 4e-2), rtol=1e-2).item()
    # Outside of a frozen model too.
    assert list(dict(tree_flatten(layer.trainable_parameters()))) == ["lora_b"]


def test_sorted_rows_are_multiplied_as_sorted(monkeypatch):
    """MLX has a faster product for rows that are sorted by expert, if it is told that they are."""
    model, told, product = make(), [], mx.gather_mm
    targets = target_linears(model, 1, ["up_proj"], experts=True)
    shape = next(map(linear_shape, targets.values()))
    plan = RankPlan(1, 1, {name: ModulePlan(1, 1.0, 1.0, *shape) for name in targets})
    attach(model, plan, {f"{name}.lora_a": mx.ones((shape[1], 1)) for name in targets})

    def watched(*arrays, **options):
        told.append(options["sorted_indices"])
        return product(*arrays, **options)

    monkeypatch.setattr(mx, "gather_mm", watched)
    model(mx.zeros((1, 4), mx.int32))
    assert not any(told)
    told.clear()
    model(mx.zeros((1, 64), mx.int32))
    assert len(told) == 2 * 3 + 2
    assert all(told)


@pytest.mark.parametrize("mode", [None, ("affine", 32, 4, False), ("nvfp4", 16, 4, True)])
def test_all_experts_at_once_are_each_of_them(mode, monkeypatch):
    """Some experts have no row; also a few experts, and a few of their rows, at a time."""
    mx.random.seed(0)
    switch = SwitchLinear(32, 12, EXPERTS, bias=False)
    if mode:
        kind, group_size, bits, global_scale = mode
        options = (group_size, bits, kind, global_scale)
        switch = QuantizedSwitchLinear(32, 12, EXPERTS, False, *options)
    indices = mx.array([[[3, 1], [0, 3], [3, 0]]])
    x, delta = mx.random.normal((1, 3, 1, 1, 32)), mx.random.normal((1, 3, 2, 1, 12))
    rows = mx.broadcast_to(x, (1, 3, 2, 1, 32)).reshape(6, 32)
    expected = []
    for e in range(EXPERTS):
        chosen = mx.array(np.array(indices).reshape(-1) == e)[:, None]
        pairs = [(delta.reshape(6, 12) * chosen, rows * chosen)]
        expected.append(mean_products(Expert(switch, e), pairs).item())
    assert [e > 0 for e in expected] == [True, True, False, True, False]
    for piece in (sensitivity.STACK_PIECE, 800, 100):
        monkeypatch.setattr(sensitivity, "STACK_PIECE", piece)
        found = sensitivity.mean_products_of_experts(switch, delta, x, indices)
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_more_experts_are_not_a_longer_graph(tmp_path):
    """Nor is anything evaluated on the way, which would fail while compiling."""

    def operations(experts):
        switch = SwitchLinear(8, 8, experts, bias=False)

        @mx.compile
        def compiled(x, indices):
            return sensitivity.mean_products_of_experts(switch, x, x, indices)

        x, indices = mx.zeros((20, 1, 8)), mx.arange(20) % experts
        mx.eval(switch.parameters(), x, indices)
        assert compiled(x, indices).shape == (experts,)
        graph = tmp_path / f"{experts}.dot"
        found = sensitivity.mean_products_of_experts(switch, x, x, indices)
        mx.export_to_dot(str(graph), found)
        return graph.read_text().count("shape=rectangle")

    assert operations(64) == operations(4) > 5
