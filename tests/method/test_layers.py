import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.method.layers import (
    TLoRALinear,
    adapter_tensors,
    adapters_off,
    attach,
    dense_weight,
    linear_shape,
    target_linears,
    trained_parameters,
)

TOKENS = mx.array([[5, 6, 7, 8, 9, 10]])


def some_plan(targets, rank_of=lambda i: (i * 3) % 5):
    modules = {}
    for i, (name, linear) in enumerate(targets.items()):
        modules[name] = ModulePlan(rank_of(i), 1.0 + i / 4, 1.0, *linear_shape(linear))
    return RankPlan(4, 4, modules)


def some_tensors(plan, with_b):
    mx.random.seed(1)
    tensors = {}
    for name, m in plan.adapted().items():
        tensors[f"{name}.lora_a"] = mx.random.normal((m.in_features, m.rank))
        if with_b:
            tensors[f"{name}.lora_b"] = 0.1 * mx.random.normal((m.rank, m.out_features))
    return tensors


@pytest.fixture
def model(model_path):
    return load_model(model_path)[0]


def test_targets_are_the_linear_layers_in_the_blocks(model):
    names = list(target_linears(model))
    assert len(names) == 14
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert not any("embed" in name or "lm_head" in name for name in names)
    assert {n.split(".")[2] for n in target_linears(model, num_layers=1)} == {"1"}
    assert list(target_linears(model, suffixes=["v_proj"])) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_the_message_about_unknown_targets_names_those_that_exist(model):
    with pytest.raises(ValueError, match=r"named proj_q; .* are down_proj, .*, v_proj"):
        target_linears(model, suffixes=["q_proj", "proj_q"])


def test_the_logits_are_exactly_the_base_models_before_the_first_step(model):
    before = model(TOKENS)
    plan = some_plan(target_linears(model))
    attach(model, plan, some_tensors(plan, with_b=False))
    assert mx.array_equal(model(TOKENS), before)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_only_b_is_trained_and_kept_in_float32(model, dtype):
    model.set_dtype(dtype)
    plan = some_plan(target_linears(model))
    attach(model, plan, some_tensors(plan, with_b=False))
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert set(trained) == {f"{name}.lora_b" for name in plan.adapted()}
    assert trained_parameters(model) == sum(m.rank * m.out_features for m in plan.modules.values())
    assert {b.dtype for b in trained.values()} == {mx.float32}
    # A layer by itself, outside of a frozen model, trains B alone too.
    layer = TLoRALinear(nn.Linear(8, 6), mx.zeros((8, 2)), 1.0)
    assert list(dict(tree_flatten(layer.trainable_parameters()))) == ["lora_b"]
    assert model(TOKENS).dtype == dtype


def test_the_layer_against_numpy():
    random = np.random.default_rng(0)
    w, bias, x, a, b = (
        random.standard_normal(shape).astype(np.float32)
        for shape in [(6, 8), (6,), (2, 3, 8), (8, 2), (2, 6)]
    )
    linear = nn.Linear(8, 6)
    linear.weight, linear.bias = mx.array(w), mx.array(bias)
    y = TLoRALinear(linear, mx.array(a), 1.75, mx.array(b))(mx.array(x))
    expected = x.astype(np.float64) @ (w.T + 1.75 * a.astype(np.float64) @ b) + bias
    assert np.abs(np.array(y) - expected).max() < 1e-5


def test_a_b_below_float16s_range():
    """B is scaled before it is rounded to the products' dtype: 1e-8 alone would be 0 there."""
    linear = nn.Linear(4, 3, bias=False)
    linear.weight = mx.zeros((3, 4), mx.float16)
    layer = TLoRALinear(linear, mx.ones((4, 1)), 1e6, mx.full((1, 3), 1e-8))
    y = layer(mx.ones((1, 1, 4), mx.float16))
    assert mx.allclose(y, mx.full((1, 1, 3), 4e-2), rtol=1e-2).item()


@pytest.mark.parametrize(("mode", "group_size"), [("affine", 32), ("mxfp4", 32), ("nvfp4", 16)])
def test_a_quantized_layer(mode, group_size):
    mx.random.seed(0)
    linear = nn.Linear(64, 32, bias=False)
    quantized = linear.to_quantized(group_size=group_size, bits=4, mode=mode)
    assert linear_shape(quantized) == (32, 64)
    weight = dense_weight(quantized)
    assert weight.dtype == mx.float32
    x = mx.random.normal((1, 5, 64))
    assert mx.abs(quantized(x) - x @ weight.T).max().item() < 1e-4
    a, b = mx.random.normal((64, 3)), mx.random.normal((3, 32))
    layer = TLoRALinear(quantized, a, 2.0, b)
    expected = x @ (weight.T + 2.0 * a @ b)
    error = mx.abs(layer(x) - expected).max() / mx.abs(expected).max()
    assert error.item() < (1e-5 if mode == "affine" else 2e-2)  # the fp modes run A in bfloat16


def test_adapters_off_and_on_again(model):
    before = model(TOKENS)
    plan = some_plan(target_linears(model))
    attach(model, plan, some_tensors(plan, with_b=True))
    adapted = model(TOKENS)
    assert mx.abs(adapted - before).max().item() > 0.01
    with adapters_off(model):
        assert mx.array_equal(model(TOKENS), before)
    assert mx.array_equal(model(TOKENS), adapted)


def test_tensors_of_a_model_attach_to_another(model, model_path):
    plan = some_plan(target_linears(model))
    attach(model, plan, some_tensors(plan, with_b=True))
    tensors = adapter_tensors(model)
    assert len(tensors) == 2 * len(plan.adapted())
    other = attach(load_model(model_path)[0], plan, tensors)
    assert mx.array_equal(other(TOKENS), model(TOKENS))


def test_all_faults_of_an_adapter_in_one_message(model):
    plan = some_plan(target_linears(model), rank_of=lambda i: 2)
    tensors = some_tensors(plan, with_b=True)
    first, second, third, *_ = plan.modules
    tensors[f"{first}.lora_a"] = mx.zeros((48, 3))
    tensors[f"{second}.lora_b"] = mx.full((2, 24), mx.inf)
    del tensors[f"{third}.lora_a"]
    with pytest.raises(ValueError, match="shape") as error:
        attach(model, plan, tensors)
    message = str(error.value)
    assert f"{first}.lora_a has shape (48, 3), but the plan needs (48, 2)" in message
    assert f"{second}.lora_b has entries that are not finite" in message
    assert f"{third}.lora_a is missing" in message
    with pytest.raises(ValueError, match="nonsense is not in the plan"):
        attach(model, plan, some_tensors(plan, True) | {"nonsense": mx.zeros((1,))})
