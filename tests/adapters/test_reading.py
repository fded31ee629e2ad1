"""Adapters that PEFT and mlx-lm really wrote are read, loaded and trained further."""

import json
import re
import shutil
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from helpers.adapters import edit, make_run, mlx_lm_adapter, peft_adapter, zero_one_cap
from helpers.commands import assert_one_sentence, quick_train, val_losses
from helpers.exports import export_peft
from helpers.logits import TOKENS, base_model, logits_of, mlx_logits
from helpers.models import save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from tlora_mlx import UserError, load_adapter, read_adapter, read_run
from tlora_mlx.adapters.binding import add_rank_zero_modules, drop_zero_ranks
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.storage.files import write_json
from tlora_mlx.storage.safetensors import write_tensors


@pytest.fixture(scope="module")
def plain(model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "peft"
    peft_adapter(model_path, path)
    return path


PATTERNS = {
    # A bare dot is a wildcard, the first match counts, and an end must follow a dot.
    "rank_pattern": {r"layers.1.self_attn.q_proj": 7, "q_proj": 2, "proj": 1, "k_p.*": 5},
    "alpha_pattern": {"^model.layers.0.mlp.(up|down)_proj": 20, "v_proj": 0.5},
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        PATTERNS,
        {**PATTERNS, "use_rslora": True, "target_modules": r".*\.\d+\.(mlp\.[ud].*|.*\.[qv]_proj)"},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal"},
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["up_proj.weight"],
            "rank_pattern": {"up_proj": 7, "up_proj.weight": 3},
            "alpha_pattern": {"1.mlp.up_proj.weight": 1},
        },
    ],
    ids=["plain", "rslora", "patterns", "regex", "layers", "one kind", "parameters"],
)  # fmt: skip
def test_a_peft_adapter_gives_pefts_logits(model_path, tmp_path, options):
    expected = peft_adapter(model_path, tmp_path / "peft", **options)
    assert np.abs(expected - logits_of(base_model(model_path))).max() > 0.01
    assert np.abs(mlx_logits(tmp_path / "peft") - expected).max() < 1e-4


def is_the_same(name, tensor, other):
    """A to the bit; B to the two roundings of the scale, which a run folds in and takes out."""
    if name.endswith(".lora_a"):
        return mx.array_equal(tensor, other)
    return mx.allclose(tensor, other, rtol=2**-22, atol=0.0)


@pytest.mark.parametrize("layout", ["portable", "compact"])
def test_the_round_trip_through_peft(model_path, data_path, tlora_here, tmp_path, layout):
    """Trained in MLX, exported, trained further in torch, read back: equal logits."""
    run = make_run(tmp_path / "run", model_path, zero_one_cap)
    export_peft(read_run(run), tmp_path / "out", layout)
    model = PeftModel.from_pretrained(base_model(model_path), tmp_path / "out", is_trainable=True)
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    tokens = torch.tensor(TOKENS)
    model(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()
    model.save_pretrained(tmp_path / "back")
    expected = logits_of(model.eval())
    assert np.abs(expected - mlx_logits(run)).max() > 0.01
    assert np.abs(mlx_logits(tmp_path / "back") - expected).max() < 1e-4

    # As a run directory, and from it to PEFT again.
    result = tlora_here("export", tmp_path / "back", "--format", "run", "--output", tmp_path / "in")
    assert (result.returncode, result.stderr) == (0, "")
    again = read_run(tmp_path / "in")
    assert again.config["base_model"] == str(model_path)
    assert np.abs(mlx_logits(tmp_path / "in") - expected).max() < 1e-4
    # The padding is gone, and the ranks of 0 are back where a kind is adapted in another block.
    ranks = {name: module.rank for name, module in read_run(run).plan.modules.items()}
    found = {name: module.rank for name, module in again.plan.modules.items()}
    assert found == {name: rank for name, rank in ranks.items() if name in found}
    assert len(found) == (14 if layout == "portable" else 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_peft(again, tmp_path / "again", layout)
        there = PeftModel.from_pretrained(base_model(model_path), tmp_path / "again")
    assert np.abs(logits_of(there) - expected).max() < 1e-4

    # Training goes on from what came back: its A, its B.
    options = {"iters": 2, "steps_per_eval": 1, "save_every": 1, "keep_checkpoints": 9}
    source = str(tmp_path / "back")
    on = quick_train(model_path, data_path, tmp_path / "on", from_adapter=source, rank=8, **options)
    start = mx.load(str(on / "checkpoints" / "0000000" / "adapters.safetensors"))
    for name, tensor in again.tensors.items():
        assert is_the_same(name, start[name], tensor)
    for name, tensor in read_run(on).tensors.items():
        assert mx.array_equal(start[name], tensor) == name.endswith(".lora_a"), name


def test_kinds_missing_from_a_block_get_rank_0(model_path, tmp_path):
    pattern = r"model\.layers\.(0\.self_attn\.(q|o)_proj|1\.self_attn\.q_proj|1\.mlp\.up_proj)"
    peft_adapter(model_path, tmp_path / "peft", target_modules=pattern)
    plan = resolve_adapter(tmp_path / "peft").plan
    ranks = {name.removeprefix("model.layers."): m.rank for name, m in plan.modules.items()}
    assert ranks == {
        "0.self_attn.q_proj": 4, "0.self_attn.o_proj": 4, "0.mlp.up_proj": 0,
        "1.self_attn.q_proj": 4, "1.self_attn.o_proj": 0, "1.mlp.up_proj": 4,
    }  # fmt: skip
    assert plan.modules["model.layers.0.mlp.up_proj"].out_features == 80


def test_no_kind_is_added_to_blocks_that_cannot_have_it():
    """Attention and convolution alternate: only the first and third block have q_proj."""
    model = nn.Module()
    model.layers = [nn.Module(), nn.Module(), nn.Module(), nn.Module()]
    for block, held in zip(model.layers, ["attn", "conv", "attn", "attn"], strict=True):
        part = nn.Module()
        for name in ("q_proj", "v_proj") if held == "attn" else ("in_proj",):
            part[name] = nn.Linear(4, 6)
        block[held] = part
    adapted = ["layers.0.attn.q_proj", "layers.1.conv.in_proj", "layers.2.attn.v_proj"]
    found = dict.fromkeys(adapted, ModulePlan(2, 1.0, 0.0, 6, 4))
    plan = add_rank_zero_modules(RankPlan(2, 2.0, found), model)
    assert {name: module.rank for name, module in plan.modules.items()} == {
        "layers.0.attn.q_proj": 2, "layers.0.attn.v_proj": 0, "layers.1.conv.in_proj": 2,
        "layers.2.attn.q_proj": 0, "layers.2.attn.v_proj": 2,
    }  # fmt: skip


def test_an_mlx_lm_adapter_gives_mlx_lms_logits(model_path, tlora_here, tmp_path):
    expected = mlx_lm_adapter(model_path, tmp_path / "mlx")
    assert np.abs(mlx_logits(tmp_path / "mlx") - expected).max() < 1e-4
    result = tlora_here("export", tmp_path / "mlx")
    assert result.returncode == 0, result.stderr
    adapter = PeftModel.from_pretrained(base_model(model_path), tmp_path / "mlx-peft")
    assert np.abs(logits_of(adapter) - expected).max() < 1e-4


def test_another_base_for_another_tools_adapter(model_path, plain, tmp_path):
    elsewhere = save_model(tmp_path / "elsewhere")
    assert resolve_adapter(plain, str(elsewhere)).model == str(elsewhere)
    adapter = shutil.copytree(plain, tmp_path / "peft")
    edit(adapter, base_model_name_or_path="no/such-model")
    with pytest.raises(UserError, match=r"base model of adapter .*no/such-model.*--base-model"):
        resolve_adapter(adapter)
    assert resolve_adapter(adapter, str(model_path)).plan == resolve_adapter(plain).plan
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(UserError, match="names no base model; name it with --base-model"):
        resolve_adapter(adapter)
    (tmp_path / "gpt").mkdir()
    gpt2 = {"n_ctx": 64, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}
    gpt2 |= {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "vocab_size": 300}
    write_json(tmp_path / "gpt" / "config.json", gpt2)
    with pytest.raises(UserError, match="MLX names of these modules of family 'gpt2' are not"):
        resolve_adapter(plain, str(tmp_path / "gpt"))
    write_json(tmp_path / "gpt" / "config.json", {"model_type": "gpt2"})
    with pytest.raises(UserError, match=r"mlx-lm cannot build model .*; see --base-model"):
        resolve_adapter(plain, str(tmp_path / "gpt"))
    narrow = save_model(tmp_path / "narrow", hidden_size=24)
    with pytest.raises(UserError, match=rf"{plain} does not fit model {narrow}: .*q_proj.lora_a"):
        resolve_adapter(plain, str(narrow))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, "uses use_dora, modules_to_save"),
        ({"bias": "all"}, "uses bias all"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.up"]}, "uses target_parameters other than linear"),
        ({"init_lora_weights": "pissa_niter_4"}, "uses init_lora_weights pissa_niter_4"),
        ({"peft_type": "IA3"}, "is a PEFT adapter of type IA3, not LORA"),
        ({"peft_type": None, "r": 8}, "of type None, not LORA"),
        ({"r": 0}, "has no 'r' and 'lora_alpha' above 0"),
        ({"lora_alpha": 10**400}, "has no 'r' and 'lora_alpha' above 0"),
        ({"lora_alpha": "16"}, "has no 'r' and 'lora_alpha' above 0"),
        (
            {"rank_pattern": {"(": 4}},
            r"has '\(' in its 'rank_pattern', which is not a regular",
        ),
        (
            {"alpha_pattern": {"q_proj": "x"}},
            "'alpha_pattern' that is not a table of numbers",
        ),
        ({"rank_pattern": {"0.*q_proj": 5}}, "layers.0.self_attn.q_proj has rank 4, but 5 in the"),
    ],
)
def test_unsupported_peft_adapters_are_refused(plain, tmp_path, changes, message):
    path = shutil.copytree(plain, tmp_path / "peft")
    edit(path, **changes)
    with pytest.raises(UserError, match=message) as error:
        read_adapter(path)
    assert "\n" not in str(error.value)


def test_bad_tensors_are_refused(plain, tmp_path):
    path = shutil.copytree(plain, tmp_path / "peft")
    file = path / "adapter_model.safetensors"
    tensors = mx.load(str(file))
    q = "base_model.model.model.layers.0.self_attn.q_proj"

    def refused(message, changes=(), without=()):
        kept = {key: value for key, value in tensors.items() if key not in without}
        write_tensors(file, {**kept, **dict(changes)}, {})
        with pytest.raises(UserError, match=message):
            read_adapter(path)

    refused("q_proj has only B", without=[f"{q}.lora_A.weight"])
    refused("A of rank 4 and B of rank 3", {f"{q}.lora_B.weight": mx.zeros((48, 3))})
    refused("q_proj.lora_a is not finite", {f"{q}.lora_A.weight": mx.full((4, 48), mx.nan)})
    refused(r"q_proj.lora_a is of shape \(48, 0\)", {f"{q}.lora_A.weight": mx.zeros((0, 48))})
    refused("of dtype uint64", {f"{q}.lora_A.weight": mx.zeros((4, 48), mx.uint64)})
    refused("of shape .* not a linear layer's", {f"{q}.lora_A.weight": mx.zeros((1, 1, 4, 48))})
    magnitude = {f"{q}.lora_magnitude_vector": mx.zeros(48)}
    refused("not LoRA matrices of a linear layer: .*lora_magnitude_vector", magnitude)
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": mx.zeros((4, 300))}
    refused("not LoRA matrices of a linear layer: .*lora_embedding_A", embedding)
    refused("has no tensors", without=tensors)
    nothing = {key: mx.zeros(tensors[key].shape) for key in tensors if "lora_A" in key}
    write_tensors(file, tensors | nothing, {})
    with pytest.raises(UserError, match="has no effect: A is zero in all of its modules"):
        drop_zero_ranks(resolve_adapter(path))
    write_tensors(file, tensors, {})
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="damaged or cut short"):
        read_adapter(path)
    file.rename(path / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle file"):
        read_adapter(path)
    (path / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="the PEFT adapter is missing"):
        read_adapter(path)


def test_unsupported_mlx_lm_adapters_are_refused(model_path, tmp_path):
    path = tmp_path / "mlx"
    mlx_lm_adapter(model_path, path)
    for changes, message in (
        ({"fine_tune_type": "dora"}, "is of type dora"),
        ({"lora_parameters": None}, "no 'lora_parameters' with 'rank' and 'scale'"),
        ({"lora_parameters": {"rank": 2, "scale": 1.0}}, "configuration has rank 2, but .* has 3"),
    ):
        broken = shutil.copytree(path, tmp_path / "broken", dirs_exist_ok=True)
        edit(broken, **changes)
        with pytest.raises(UserError, match=message):
            read_adapter(broken)
    write_json(path / "adapter_config.json", {"model": "x"})
    with pytest.raises(UserError, match="is not a run, PEFT adapter or mlx-lm adapter"):
        read_adapter(path)
    with pytest.raises(UserError, match="does not exist"):
        read_adapter(tmp_path / "nothing")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 300), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "peft_type"]
KEYS += [
    "target_parameters",
    "init_lora_weights",
    "base_model_name_or_path",
    "fine_tune_type",
    "lora_parameters",
]


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), cut=st.integers(0, 999))
def test_any_configuration_and_damage(plain, tmp_path_factory, changes, cut):
    path = tmp_path_factory.mktemp("fuzz") / "peft"
    shutil.copytree(plain, path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    file = path / "adapter_model.safetensors"
    if cut < 300:
        data = bytearray(file.read_bytes())
        data[cut % 200] ^= 1 << cut % 8
        file.write_bytes(data)
    try:
        scales = [module.scale for module in read_adapter(path).plan.modules.values()]
        said = "one line"
    except UserError as error:
        scales, said = [], str(error)
    shutil.rmtree(path)
    assert np.isfinite(scales).all()
    assert len(said.splitlines()) == 1


def test_an_interrupted_run_resumes_without_the_adapter_it_started_from(
    model_path, data_path, plain, tmp_path
):
    source = shutil.copytree(plain, tmp_path / "source")
    options = {"from_adapter": str(source), "rank": 8, "iters": 4, "save_every": 2}
    whole = quick_train(model_path, data_path, tmp_path / "whole", **options)
    cut = shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "0000004")
    (cut / "adapters.safetensors").unlink()
    shutil.rmtree(source)
    config = json.loads((cut / "adapter_config.json").read_text())
    assert (config["rank"], config["alpha"]) == (4, 6)
    from tlora_mlx.train import main

    assert main(["--adapter-path", str(cut), "--resume"]) == 0
    for name in ("adapters.safetensors", "rank_plan.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_the_adapter_is_kept_if_training_makes_it_worse(model_path, data_path, plain, tmp_path):
    options = {"from_adapter": str(plain), "rank": 8, "iters": 1, "steps_per_eval": 1}
    run = quick_train(model_path, data_path, tmp_path / "run", learning_rate=3.0, **options)
    for name, tensor in resolve_adapter(plain).tensors.items():
        assert is_the_same(name, read_run(run).tensors[name], tensor)
    losses = val_losses(run)
    assert losses[0] < losses[1]


def test_training_further_on_a_quantized_model(model_path, data_path, tlora_here, tmp_path):
    from mlx_lm import convert

    original = save_model(tmp_path / "original", hidden_size=64, intermediate_size=128)
    four = str(tmp_path / "four")
    convert(str(original), four, quantize=True, q_bits=4, q_group_size=32)
    peft_adapter(original, tmp_path / "peft")
    to_run = ["export", tmp_path / "peft", "--format", "run", "--base-model", four]
    result = tlora_here(*to_run, "--output", tmp_path / "run")
    assert (result.returncode, result.stderr) == (0, "")
    assert "quantization" in load_adapter(tmp_path / "run").config
    on = quick_train(four, data_path, tmp_path / "on", from_adapter=str(tmp_path / "run"), rank=8)
    assert read_run(on).config["model"] == four
    # What is exported is for the original, which the adapter had named.
    assert tlora_here("export", tmp_path / "run", "--output", tmp_path / "out").returncode == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(original)


def test_a_base_on_the_hub_needs_only_its_configuration(model_path, plain, monkeypatch, tmp_path):
    """Nothing else of a cached model is needed."""
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(model_path / "config.json", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    run = resolve_adapter(plain, "org/tiny")
    assert (run.model, run.original, run.model_type) == ("org/tiny", "org/tiny", "llama")


def test_from_adapter_refusals(model_path, data_path, plain, tlora_here, tmp_path):
    required = ["--model", model_path, "--data", data_path, "--adapter-path", tmp_path / "run"]
    start = ["train", *required, "--iters", 2]
    more = ["--from-adapter", plain, "--rank", 4, "--plan", "plan.json"]
    assert_one_sentence(
        tlora_here(*start, *more), 2, "--rank, --plan cannot be used with --from-adapter"
    )
    wide = save_model(tmp_path / "wide", hidden_size=96)
    result = tlora_here(*start, "--from-adapter", plain, "--model", wide)
    assert_one_sentence(result, 2, f"the adapter {plain} does not fit model {wide}")
    other = make_run(tmp_path / "other", model_path, lambda i, shape: 2, model_type="qwen2")
    result = tlora_here(*start, "--from-adapter", other)
    assert_one_sentence(result, 2, f"the run {other} is of family 'qwen2', but {model_path} is")
    assert not (tmp_path / "run").exists()


def test_a_differing_base_model_is_mentioned(model_path, data_path, plain, capsys, tmp_path):
    again = shutil.copytree(model_path, tmp_path / "again")
    quick_train(again, data_path, tmp_path / "run", from_adapter=str(plain), rank=8, iters=1)
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"warning: {plain} was made for {model_path}, but --model is {again}" in said
    assert load_adapter(tmp_path / "run").name == str(again)


def test_a_base_model_by_a_relative_path_is_the_same(
    model_path, data_path, capsys, tmp_path, monkeypatch
):
    peft_adapter(model_path, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = model_path.name
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(model_path.parent)
    adapter = str(tmp_path / "peft")
    quick_train(model_path, data_path, tmp_path / "run", from_adapter=adapter, rank=8, iters=1)
    assert "was made for" not in capsys.readouterr().out
