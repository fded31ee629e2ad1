"""The real readers load exports: PEFT on torch, and each reader's own scaling rule."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.adapters import make_run, zero_one_cap
from helpers.commands import tlora
from helpers.exports import export_peft
from helpers.logits import base_model, logits_of, merged_logits, mlx_logits, peft_logits
from safetensors.torch import load_file

from tlora_mlx import UserError, read_run
from tlora_mlx.storage.safetensors import write_tensors


@pytest.fixture(scope="module")
def mixed_run(model_path, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("mixed") / "run", model_path, zero_one_cap)


def test_the_adapters_matter(model_path, mixed_run):
    assert np.abs(mlx_logits(mixed_run) - logits_of(base_model(model_path))).max() > 0.5


@pytest.mark.parametrize("layout", ["portable", "compact"])
def test_ranks_0_1_and_the_cap_in_peft(model_path, mixed_run, tmp_path, layout):
    adapter = export_peft(read_run(mixed_run), tmp_path / "peft", layout)
    assert np.abs(peft_logits(model_path, adapter) - mlx_logits(mixed_run)).max() < 1e-4


@pytest.mark.parametrize("rule", ["global", "tensor"])
def test_portable_needs_one_scaling_rule_and_no_patterns(model_path, mixed_run, tmp_path, rule):
    adapter = export_peft(read_run(mixed_run), tmp_path / "peft", "portable")
    expected = mlx_logits(mixed_run)
    assert np.abs(merged_logits(model_path, adapter, rule) - expected).max() < 1e-4
    # The check can fail: compact is wrong by these rules.
    compact = export_peft(read_run(mixed_run), tmp_path / "compact", "compact")
    assert np.abs(merged_logits(model_path, compact, rule) - expected).max() > 0.1


def test_the_portable_layout_keeps_its_promises(mixed_run, tmp_path):
    adapter = export_peft(read_run(mixed_run), tmp_path / "peft", "portable")
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == 32  # the largest rank is 24
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    kinds = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == kinds
    assert (config["bias"], config["task_type"]) == ("none", "CAUSAL_LM")
    assert config["modules_to_save"] is None
    assert config["inference_mode"] is True
    assert not config["use_dora"]
    assert not config["use_rslora"]
    # Every kind in every block, of one rank and one dtype.
    assert len(tensors) == 2 * 2 * 7
    for key, tensor in tensors.items():
        assert tensor.shape[0 if "lora_A" in key else 1] == 32
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize(("largest", "rank"), [(1, 8), (8, 8), (9, 16), (16, 16)])
def test_the_portable_rank_is_the_smallest_that_fits(model_path, tmp_path, largest, rank):
    run = make_run(tmp_path / "run", model_path, lambda i, shape: largest if i == 3 else 1)
    adapter = export_peft(read_run(run), tmp_path / "peft", "portable")
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == rank


def test_the_compact_layout(mixed_run, tmp_path):
    run = read_run(mixed_run)
    adapter = export_peft(run, tmp_path / "peft", "compact")
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(run.plan.adapted())
    assert sum(t.numel() for t in tensors.values()) == sum(t.size for t in run.tensors.values())
    assert config["target_modules"] == sorted(run.plan.adapted())
    assert r"^model\.layers\.0\.self_attn\.k_proj$" in config["rank_pattern"]
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()


@pytest.mark.parametrize("layout", ["portable", "compact"])
def test_only_the_last_blocks(model_path, tmp_path, layout):
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2, num_layers=1)
    adapter = export_peft(read_run(run), tmp_path / "peft", layout)
    assert np.abs(peft_logits(model_path, adapter) - mlx_logits(run)).max() < 1e-4
    assert not any(".layers.0." in key for key in load_file(adapter / "adapter_model.safetensors"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("bfloat16", 2e-1)])
def test_dtypes(model_path, mixed_run, tmp_path, dtype, tolerance):
    adapter = export_peft(read_run(mixed_run), tmp_path / "peft", dtype=dtype)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert np.abs(peft_logits(model_path, adapter) - mlx_logits(mixed_run)).max() < tolerance


def test_a_value_that_overflows_float16(model_path, tmp_path):
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2)
    tensors = mx.load(str(run / "adapters.safetensors"))
    key = "model.layers.0.self_attn.q_proj.lora_b"
    write_tensors(run / "adapters.safetensors", tensors | {key: 1e6 * mx.ones((2, 48))}, {})
    with pytest.raises(UserError, match=r"q_proj\.lora_B\.weight overflow float16"):
        export_peft(read_run(run), tmp_path / "peft", dtype="float16")
    assert not (tmp_path / "peft").exists()


def test_the_command(run_path, model_path, tmp_path):
    out = tmp_path / "nested" / "peft"
    result = tlora("export", run_path, "--format", "peft", "--output", out, "--base-model", "a/b")
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "rank_plan.png",
    ]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "a/b"
    assert [p.name for p in out.parent.iterdir()] == ["peft"]  # nothing half-written beside it
    again = tlora("export", run_path, "--output", out)
    assert again.returncode == 2
    assert "already exists" in again.stderr


def test_refusals(model_path, tmp_path):
    def refused(match, **config):
        run = make_run(tmp_path / match[:4], model_path, lambda i, shape: 2, **config)
        with pytest.raises(UserError, match=match) as error:
            export_peft(read_run(run), tmp_path / "peft")
        assert not (tmp_path / "peft").exists()
        return str(error.value)

    assert "known: afmoe" in refused("family 'bert' are not known", model_type="bert")
    # The base is a quantized conversion whose card names no original.
    refused("card names no original", base_model=None)
    big = make_run(tmp_path / "big", model_path, lambda i, shape: 2)
    plan = json.loads((big / "rank_plan.json").read_text())
    name = next(iter(plan["modules"]))
    plan["modules"][name] |= {"rank": 600, "in_features": 700, "out_features": 700}
    (big / "rank_plan.json").write_text(json.dumps(plan))
    tensors = mx.load(str(big / "adapters.safetensors"))
    tensors |= {f"{name}.lora_a": mx.ones((700, 600)), f"{name}.lora_b": mx.ones((600, 700))}
    write_tensors(big / "adapters.safetensors", tensors, {})
    with pytest.raises(UserError, match="largest rank 600 is above 512"):
        export_peft(read_run(big), tmp_path / "peft")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", None, "the run's configuration is missing"),
        ("adapter_config.json", "{", "is not valid JSON"),
        ("adapter_config.json", '{"peft_type": "LORA"}', "another tool's"),
        (
            "adapter_config.json",
            '{"fine_tune_type": "tlora"}',
            "has no 'model' and no 'model_type'",
        ),
        ("rank_plan.json", None, "the run's rank plan is missing"),
        ("rank_plan.json", "[]", "has no table 'modules'"),
        ("adapters.safetensors", None, "the run's adapter is missing"),
        ("adapters.safetensors", "short", "damaged or cut short"),
    ],
)
def test_damaged_runs(model_path, tmp_path, file, content, message):
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2)
    if content is None:
        (run / file).unlink()
    elif content == "short":
        (run / file).write_bytes((run / file).read_bytes()[:-10])
    else:
        (run / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read_run(run)


def test_an_adapter_that_does_not_fit_its_plan(model_path, tmp_path):
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2)
    tensors = mx.load(str(run / "adapters.safetensors"))
    del tensors["model.layers.0.mlp.up_proj.lora_b"]
    tensors["model.layers.1.mlp.up_proj.lora_b"] *= mx.nan
    write_tensors(run / "adapters.safetensors", tensors, {})
    with pytest.raises(UserError, match="does not fit its plan") as error:
        read_run(run)
    assert "layers.1.mlp.up_proj.lora_b has entries that are not finite" in str(error.value)
    assert "layers.0.mlp.up_proj.lora_b is missing" in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "nothing")
