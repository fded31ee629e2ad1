"""mlx-lm's kernels have no gradient; its models have one while we differentiate them."""

import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from types import FunctionType, SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import torch
from helpers.metal import Metal, on_the_cpu
from helpers.models import save_model
from mlx.utils import tree_flatten
from mlx_lm import models
from mlx_lm.models import gated_delta, rwkv7

from tlora_mlx.models.base_model import load_base_model
from tlora_mlx.models.differentiable import (
    differentiable,
    differentiable_operations,
    replacements,
)

TOKENS = mx.arange(30)[None] % 19


def gradients(model, *inputs):
    def loss(model):
        return mx.square(model(*inputs)[..., ::3]).sum()

    found = nn.value_and_grad(model, loss)(model)[1]
    mx.eval(found)
    return dict(tree_flatten(found))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, ours in found.items():
        ours, theirs = np.array(ours), np.array(expected[name])
        assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max(), name


def gradients_without_kernels(metal, model):
    """Outside of ``differentiable``, a kernel's gradient raises; inside, none is launched."""
    with pytest.raises(RuntimeError, match="Not implemented for CustomKernel"):
        gradients(model, TOKENS)
    launches = metal.launches()
    assert launches > 0
    with differentiable(model):
        found = gradients(model, TOKENS)
    assert metal.launches() == launches
    return found


def test_a_models_gradient_is_that_of_mlx_lms_loop(tmp_path, monkeypatch):
    """Without us, a model in evaluation mode has none on a Mac."""
    model = load_base_model(str(save_model(tmp_path / "model", "qwen3_next"))).model
    with on_the_cpu():
        expected = gradients(model, TOKENS)
    assert_same(gradients_without_kernels(Metal(monkeypatch), model), expected)
    assert not model.training


def test_rwkv7_uses_its_kernel_in_training_too(monkeypatch):
    mx.random.seed(0)
    ranks = dict.fromkeys(["a", "v", "gate", "decay"], 4)
    settings = {f"{name}_low_rank_dim": rank for name, rank in ranks.items()}
    model = rwkv7.Model(rwkv7.ModelArgs("rwkv7", 20, 64, 64, 1e-5, 32, 2, **settings))
    # mlx-lm makes its norms and shifts as zeros.
    model.apply(lambda p: p + 0.1 * mx.random.normal(p.shape))
    with on_the_cpu():
        expected = gradients(model, TOKENS)
    metal = Metal(monkeypatch)
    model.train()
    assert_same(gradients_without_kernels(metal, model), expected)


def test_hyper_connections_use_their_kernel_in_training_too(monkeypatch):
    deepseek = pytest.importorskip("mlx_lm.models.deepseek_v41")
    mx.random.seed(0)
    layer = deepseek.HyperConnection(deepseek.ModelArgs(hidden_size=8, hc_mult=4))
    layer.fn, streams = mx.random.normal(layer.fn.shape), mx.random.normal((1, 3, 4, 8))

    def mixed(streams):
        return sum((part * part).sum() for part in layer(streams))

    with on_the_cpu():
        expected = mx.grad(mixed)(streams)
        mx.eval(expected)
    Metal(monkeypatch)
    with pytest.raises(RuntimeError, match="Not implemented for CustomKernel"):
        mx.grad(mixed)(streams)
    with differentiable(layer):
        assert_same({"": mx.grad(mixed)(streams)}, {"": expected})


def test_attention_residuals(monkeypatch):
    kimi = pytest.importorskip("mlx_lm.models.kimi_k3")
    mx.random.seed(0)
    linear = {"num_heads": 2, "head_dim": 32, "short_conv_kernel_size": 4, "kda_layers": [1, 2]}
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    args = kimi.TextArgs(**sizes, linear_attn_config=linear, attn_res_block_size=1)
    model = kimi.LanguageModel(args)
    with on_the_cpu():
        expected = gradients(model, TOKENS)
    metal = Metal(monkeypatch)
    mx.eval(model.eval()(TOKENS))
    launches = [kernel.launches for kernel in metal.kernels]
    assert sum(map(bool, launches)) == 2  # of the delta rule and of the residuals
    with differentiable(model):
        assert_same(gradients(model, TOKENS), expected)
    assert [kernel.launches for kernel in metal.kernels] == launches


def muse_spark(monkeypatch):
    """A tiny language model in mlx-lm, without its roundings to bfloat16, and in transformers."""
    theirs = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
    module = pytest.importorskip("mlx_lm.models.muse_spark")
    monkeypatch.setattr(module, "mx", SimpleNamespace(**vars(mx) | {"bfloat16": mx.float32}))
    sizes = {"vocab_size": 20, "hidden_size": 16, "moe_hidden_size": 20, "head_dim": 8}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"moe_intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = theirs.MuseSparkTextConfig(
        **sizes,
        layer_rope_theta=[5e5, 0, 5e5],
        sliding_window=8,
        initializer_range=0.3,
        routed_scaling_factor=1.5,
        eos_token_id=0,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    theirs = theirs.MuseSparkTextModel(config)
    state = theirs.state_dict()
    for tensor in state.values():
        if tensor.ndim == 1:  # norms and biases are zeros
            tensor += 0.3 * torch.randn_like(tensor)
    weights = {f"model.language_model.{name}": mx.array(state[name].numpy()) for name in state}
    ours = module.Model(module.ModelArgs("muse_spark", config.to_dict()))
    ours.load_weights(list(ours.sanitize(weights).items()), strict=False)  # no lm_head
    return ours.model.language_model, theirs


def test_muse_sparks_kernels_in_plain_operations(monkeypatch):
    """Values and gradients are those of transformers."""
    ours, theirs = muse_spark(monkeypatch)
    metal = Metal(monkeypatch)
    with differentiable(ours):
        values = np.array(ours(TOKENS))
    assert metal.launches() == 0
    found = gradients_without_kernels(metal, ours)
    expected = theirs(torch.tensor(np.array(TOKENS)), use_cache=False).last_hidden_state
    expected[..., ::3].square().sum().backward()
    assert np.abs(values - expected.detach().numpy()).max() < 1e-4
    same = {}
    for name, parameter in theirs.named_parameters():
        if name in found:  # those that mlx-lm splits or joins are left out
            same[name] = parameter.grad.numpy()
        elif name.endswith("gate_up_proj"):
            parts = np.split(parameter.grad.numpy(), 2, axis=1)
            for part, gradient in zip(("gate_proj", "up_proj"), parts, strict=True):
                same[name.replace("gate_up_proj", f"{part}.weight")] = gradient
    assert len(same) >= 10 * 3
    assert_same({name: found[name] for name in same}, same)


# Where mlx-lm makes Metal kernels, how many, and why none of them is in the way of a gradient.
KERNELS_OF_MLX_LM = {
    # Tested above, and by the families' round trips.
    "models/gated_delta.py": 3,
    "models/rwkv7.py": 1,
    "models/deepseek_v41.py": 1,
    "models/kimi_k3.py": 1,
    "kernels/expert_routing.py": 1,
    "kernels/norm_add_norm.py": 3,
    "kernels/post_expert_norm_combine.py": 1,
    "kernels/qk_norm.py": 1,
    "kernels/qk_norm_rope.py": 1,
    "kernels/rms_norm_sigmoid_gate.py": 1,
    # Inside ssm_update, which is replaced.
    "models/ssm.py": 1,
    # bitnet's layers, which are no linear layers, so the family is refused.
    "models/bitlinear_layers.py": 1,
    # Losses of mlx-lm's own trainer.
    "tuner/losses.py": 4,
}


def test_every_kernel_of_mlx_lm_is_known():
    """A later mlx-lm's new one has to be looked at: is it launched while we differentiate?"""
    found = {}
    root = Path(mlx_lm.__path__[0])
    for file in root.rglob("*.py"):
        if made := len(re.findall(r"\b(?:metal|cuda)_kernel\(", file.read_text())):
            found[file.relative_to(root).as_posix()] = made
    assert found.items() <= KERNELS_OF_MLX_LM.items()


def test_replacements_are_called_like_what_they_replace():
    """A model of a later mlx-lm may have another function of the same name."""
    compared = set()
    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        if module.name.endswith(".olmo"):  # ends the process without a package
            continue
        for holder, name, original, plain in replacements(import_module(module.name), module.name):
            if callable(plain) and isinstance(original, FunctionType):
                ours, theirs = (inspect.signature(f) for f in (plain, original))
                first = isinstance(holder, type)  # a method's self
                names = [*theirs.parameters][first:]
                bound = ours.bind(*[None] * first, **dict.fromkeys(names))
                positional = [*ours.parameters][first : len(bound.args)]
                assert positional == names[: len(positional)], (module.name, name)
                compared.add(name)
    assert {"gated_delta_update", "recurrent_gla", "__call__", "pre_norm"} <= compared


def test_what_was_replaced_comes_back():
    original = gated_delta.gated_delta_update
    with pytest.raises(KeyError), differentiable_operations():
        raise KeyError(gated_delta.gated_delta_update is original)
    assert gated_delta.gated_delta_update is original
