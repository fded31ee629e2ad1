"""Experts' adapters in merged models and mlx-lm's stacks: each in its place, nothing else."""

import json
import re
from functools import partial

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.adapters import make_run, peft_adapter, zero_one_cap
from helpers.corruption import finds_every_wrong_write
from helpers.exports import (
    export_dequantized,
    export_merged,
    export_mlx_lm,
    export_peft,
    export_requantized,
)
from helpers.logits import TOKENS, mlx_logits
from helpers.models import path_for_mlx, save_model
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.tuner.utils import load_adapters
from safetensors.torch import load_file

from tlora_mlx import RunError, UserError, read_run
from tlora_mlx.adapters import mlx_lm as our_mlx_lm
from tlora_mlx.adapters.binding import drop_zero_ranks
from tlora_mlx.adapters.registry import read_adapter, resolve_adapter
from tlora_mlx.merging.rewriting import Rewriting
from tlora_mlx.method.layers import dense_weight, target_linears
from tlora_mlx.models.base_model import load_base_model
from tlora_mlx.models.names import mlx_parts
from tlora_mlx.storage.safetensors import write_tensors

# One tensor an expert; stacks with gate and up in halves of the rows; in columns that alternate.
CHECKPOINTS = ["mixtral", "granitemoe", "gpt_oss"]


def make(place, family, dtype="float32"):
    """A checkpoint and a run on it, made by hand; its experts' ranks include 0, 1 and the cap."""
    model_path = save_model(place / "model", family, dtype)
    mlx_path = path_for_mlx(model_path, family)
    options = {"experts": True, "base_model": str(model_path)}
    return model_path, make_run(place / "run", mlx_path, zero_one_cap, **options)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def made(request, tmp_path_factory):
    return request.param, *make(tmp_path_factory.mktemp(request.param), request.param)


def places(family, tensors):
    """Views of the checkpoint: each expert's weight (out, in), by the module's name."""
    found = {}
    for block in (0, 1):
        head = f"model.layers.{block}."
        for e in range(4):
            if family == "mixtral":
                moe = f"{head}block_sparse_moe."
                names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
                parts = {p: tensors[f"{moe}experts.{e}.{file}.weight"] for p, file in names.items()}
            elif family == "granitemoe":
                moe = f"{head}block_sparse_moe."
                fused = tensors[f"{moe}input_linear.weight"][e]
                parts = {"gate_proj": fused[:80], "up_proj": fused[80:]}
                parts["down_proj"] = tensors[f"{moe}output_linear.weight"][e]
            else:
                moe = f"{head}mlp."
                fused = tensors[f"{moe}experts.gate_up_proj"][e]
                parts = {"gate_proj": fused[:, 0::2].T, "up_proj": fused[:, 1::2].T}
                parts["down_proj"] = tensors[f"{moe}experts.down_proj"][e].T
            switch = f"{moe}experts." if family == "gpt_oss" else f"{moe}switch_mlp."
            found |= {f"{switch}{part}.{e}": weight for part, weight in parts.items()}
    return found


def test_each_expert_gets_its_delta_and_nothing_else_changes(made, tmp_path, capsys):
    family, model_path, run_path = made
    run = read_run(run_path)
    out = export_merged(run, tmp_path / "merged")
    adapted = run.plan.adapted()
    assert f"verified {len(adapted)} modules: max absolute error" in capsys.readouterr().out
    before = load_file(model_path / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    experts = places(family, before)
    assert experts.keys() == {name for name in run.plan.modules if "proj." in name}
    assert len(experts) > len(experts.keys() & adapted.keys()) > 10
    merged = places(family, after)
    for name, weight in experts.items():
        if name in adapted:
            a, b = (np.array(run.tensors[f"{name}.lora_{k}"]) for k in "ab")
            delta = adapted[name].scale * (a @ b).T
            assert np.abs(delta).max() > 0.01
            np.testing.assert_allclose(merged[name] - weight, delta, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(merged[name], weight)
    touched = [n for n in before if not np.array_equal(before[n], after[n])]
    assert not any("router" in name or "gate.weight" in name or "bias" in name for name in touched)


@pytest.mark.parametrize("layout", ["portable", "compact"])
def test_experts_are_read_back_from_peft(made, tmp_path, layout):
    """As many adapters as experts, of the same products; gate and up are separate again."""
    run = read_run(made[2])
    adapter = read_adapter(export_peft(run, tmp_path / "peft", layout))
    bound = drop_zero_ranks(resolve_adapter(adapter, run.config["model"]))
    ranks = {name: module.rank for name, module in run.plan.adapted().items()}
    assert {name: module.rank for name, module in bound.plan.adapted().items()} == ranks
    for name, module in run.plan.adapted().items():
        product = module.scale * run.tensors[f"{name}.lora_a"] @ run.tensors[f"{name}.lora_b"]
        again = bound.plan.modules[name]
        found = again.scale * bound.tensors[f"{name}.lora_a"] @ bound.tensors[f"{name}.lora_b"]
        assert mx.abs(found - product).max().item() < 1e-5, name


def test_experts_of_peft_itself(tmp_path):
    """One parameter, both in any order, and the modules of transformers 4."""
    model_path = save_model(tmp_path / "model", "mixtral")
    for number, parameters in enumerate((["down_proj"], ["gate_up_proj", "down_proj"])):
        path = tmp_path / str(number)
        options = {"target_parameters": [f"mlp.experts.{p}" for p in parameters]}
        expected = peft_adapter(model_path, path, target_modules=["q_proj"], **options)
        assert np.abs(mlx_logits(path) - expected).max() < 1e-4
    for projection, file in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        head = f"model.layers.1.block_sparse_moe.experts.2.{file}"
        assert mlx_parts("mixtral", head) == [
            (f"model.layers.1.block_sparse_moe.switch_mlp.{projection}.2", None)
        ]
    assert mlx_parts("mixtral", "model.layers.1.block_sparse_moe.experts.2.w4") == []


def test_a_merged_stack_that_was_written_wrongly(made, tmp_path, monkeypatch):
    """Each of many blocks is corrupted in turn, adapted or not."""
    finds_every_wrong_write(
        partial(export_merged, read_run(made[2])),
        tmp_path,
        monkeypatch,
        more_than=20,
        match=r"what was written|damaged|not finite",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["counted"]


def test_a_model_with_different_experts(made, tmp_path):
    family, _, run_path = made
    other = save_model(tmp_path / "other", family, num_local_experts=3)
    message = r"has no .*\.3\." if family == "mixtral" else r"has shape \(3, .* trained on \(4, "
    with pytest.raises(UserError, match=message):
        export_merged(read_run(run_path), tmp_path / "out", str(other))
    assert not (tmp_path / "out").exists()


def test_stacks_in_half_precision(tmp_path):
    """Rounded once, in place."""
    model_path, run_path = make(tmp_path, "gpt_oss", "bfloat16")
    run = read_run(run_path)
    after = load_file(export_merged(run, tmp_path / "merged") / "model.safetensors")
    merged = places("gpt_oss", after)
    for name, weight in places("gpt_oss", load_file(model_path / "model.safetensors")).items():
        expected = weight.float().numpy()
        if module := run.plan.adapted().get(name):
            a, b = (np.array(run.tensors[f"{name}.lora_{k}"]) for k in "ab")
            expected = expected + module.scale * (a @ b).T
        off = np.abs(merged[name].float().numpy() - expected)
        assert (off <= 2**-8 * np.abs(expected) + 1e-6).all(), name


def test_mlx_lms_stacks(made, tmp_path, monkeypatch):
    """Tensors and keys as in mlx-lm; its own fuse; and a wrong expert is found."""
    family, _, run_path = made
    run = read_run(run_path)
    adapter = export_mlx_lm(run, tmp_path / "mlx-lm")
    parameters = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]
    switch = "mlp.experts" if family == "gpt_oss" else "block_sparse_moe.switch_mlp"
    projections = ("down_proj", "gate_proj", "up_proj")
    assert set(parameters["keys"]) == {
        *(f"self_attn.{k}_proj" for k in "qkvo"),
        *(f"{switch}.{projection}" for projection in projections),
    }
    model = load_adapters(load_base_model(run.config["model"]).model, str(adapter))
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, LoRASwitchLinear)}
    assert len(stacks) == 6
    expected = mlx_logits(run_path)
    for name, stack in stacks.items():
        rank = parameters["rank"]
        assert stack.lora_a.shape == (4, rank, stack.linear.input_dims)
        assert stack.lora_b.shape == (4, stack.linear.output_dims, rank)
        owner, _, projection = name.rpartition(".")
        dict(model.named_modules())[owner][projection] = stack.fuse()
    assert np.abs(np.array(model(mx.array(TOKENS))) - expected).max() < 1e-4

    with pytest.raises(UserError, match=r"adapts stacks of experts, .*: model\.layers\.0\."):
        resolve_adapter(str(adapter), run.config["model"])

    def swapped(path, tensors, metadata):
        key = next(key for key in tensors if key.endswith("down_proj.lora_b"))
        write_tensors(path, tensors | {key: tensors[key][::-1]}, metadata)

    monkeypatch.setattr(our_mlx_lm, "write_tensors", swapped)
    with pytest.raises(RunError, match=r"what was written for model\.layers\.0\..*down_proj\.\d"):
        export_mlx_lm(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mlx-lm"]


@pytest.fixture(scope="module")
def quantized_run(tmp_path_factory):
    place = tmp_path_factory.mktemp("quantized")
    model_path = save_model(place / "model", "mixtral", hidden_size=64, intermediate_size=64)
    conversion = place / "4bit"
    mlx_lm.convert(str(model_path), str(conversion), quantize=True, q_bits=4, q_group_size=32)
    return make_run(place / "run", conversion, zero_one_cap, experts=True, base_model=None)


def dense_weights(path):
    model = load_base_model(str(path)).model
    return {n: np.array(dense_weight(m)) for n, m in target_linears(model, experts=True).items()}


@pytest.mark.parametrize("export", [export_dequantized, export_requantized])
def test_into_the_conversion_itself(export, quantized_run, tmp_path, capsys):
    run = read_run(quantized_run)
    out = export(run, tmp_path / "out")
    adapted = run.plan.adapted()
    assert re.search(rf"verified {len(adapted)} modules\b", capsys.readouterr().out)
    before, after = dense_weights(run.config["model"]), dense_weights(out)
    kept = lost = 0.0
    for name, weight in before.items():
        if name not in adapted:
            np.testing.assert_array_equal(after[name], weight, name)
            continue
        a, b = (np.array(run.tensors[f"{name}.lora_{k}"]) for k in "ab")
        delta = adapted[name].scale * (a @ b).T
        off = after[name] - weight - delta
        if export is export_dequantized:
            assert np.abs(off).max() < 1e-5 * max(1, np.abs(delta).max()), name
        kept, lost = kept + (delta**2).sum(), lost + (off**2).sum()
    assert lost < 0.02 * kept


@pytest.mark.parametrize("export", [export_dequantized, export_requantized])
def test_a_conversion_that_was_written_wrongly(export, quantized_run, tmp_path, monkeypatch):
    """Both the rows of experts with an adapter and those of experts without."""
    finds_every_wrong_write(
        partial(export, read_run(quantized_run)),
        tmp_path,
        monkeypatch,
        more_than=40,
        match=r"what was written|not finite",
        first=1,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["counted"]


def test_an_untouched_expert_of_a_copy_that_changed(quantized_run, tmp_path, monkeypatch):
    """The requantized copy is compared with the base model bit for bit, stacks included."""
    run = read_run(quantized_run)
    stacks = {name.rpartition(".")[0] for name in run.plan.adapted()}
    without = (name.rpartition(".") for name, m in run.plan.modules.items() if not m.rank)
    stack, number = next((s, int(e)) for s, _, e in without if s in stacks and e.isdigit())
    write = Rewriting.write

    def damaged(self, weight, start, parts):
        row = number * weight.rows // 4 - start
        if weight.name == stack and 0 <= row < len(parts[0]):
            parts[0][row, 0] ^= 1
        return write(self, weight, start, parts)

    monkeypatch.setattr(Rewriting, "write", damaged)
    with pytest.raises(RunError, match="what was written for the unadapted bytes"):
        export_requantized(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
