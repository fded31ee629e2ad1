"""Every family, from a checkpoint that transformers writes to one that transformers reads.

scripts/make_models_table.py writes what it finds into docs/MODELS.md.
"""

import ast
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.adapters import make_run
from helpers.commands import quick_train
from helpers.exports import export_merged, export_mlx_lm, export_peft
from helpers.families import COMMON, FAILS, FAMILIES, VARIANTS
from helpers.logits import TOKENS, base_model, logits_of, peft_logits
from helpers.metal import Metal
from helpers.models import path_for_mlx, save_model
from helpers.paths import ROOT
from mlx_lm.tuner.utils import load_adapters
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import tlora_mlx
from tlora_mlx import ModulePlan, RankPlan, UserError, load_adapter, read_run
from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.readers import readings
from tlora_mlx.method.layers import attach, target_linears
from tlora_mlx.models import names
from tlora_mlx.models.base_model import load_base_model

TOLERANCE = 1e-4


def exported_to_peft(layout):
    def logits(run, model_path, output):
        return peft_logits(model_path, export_peft(read_run(run), output, layout))

    return logits


def merged(run, model_path, output):
    return logits_of(base_model(export_merged(read_run(run), output, str(model_path))))


def exported_to_mlx_lm(run, model_path, output):
    run = read_run(run)
    base = load_base_model(run.config["model"]).model
    return mlx_logits(load_adapters(base, str(export_mlx_lm(run, output))))


# What a run is exported to, and how the other side computes logits with it.
EXPORTS = {
    "PEFT portable": exported_to_peft("portable"),
    "PEFT compact": exported_to_peft("compact"),
    "merged": merged,
    "mlx-lm": exported_to_mlx_lm,
}


def mlx_logits(model):
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def difference(a, b):
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module")
def mixtral_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("mixtral"), "mixtral")


# For which mlx-lm launches Metal kernels when it computes the logits; heads of 32 or more needed.
KERNEL_FAMILIES = {"qwen3_5", "qwen3_5_moe", "qwen3_next", "kimi_linear", "olmo_hybrid"}
EXPERT_FAMILIES = [family for family in FAMILIES if names.FAMILIES[family].experts]


def round_trip(family, data_path, path, experts=False):
    """The largest logit differences: between the bases, through training, and of each export."""
    model_path = save_model(path / "model", family)
    mlx_path = path_for_mlx(model_path, family)
    base = load_base_model(str(mlx_path))
    theirs = base_model(model_path)
    reference = logits_of(theirs)
    targets = FAMILIES[family].targets
    if not experts:
        linears = target_linears(base.model, suffixes=targets)
        seen = check_names(family, linears, model_path, theirs)
        if family in VARIANTS:
            variant = save_model(path / "variant", family, **VARIANTS[family])
            other, others = load_base_model(str(variant)).model, base_model(variant)
            seen |= check_names(family, target_linears(other), variant, others)
            assert difference(mlx_logits(other), logits_of(others)) < TOLERANCE
        assert seen == set(names.FAMILIES[family].linears) or targets
    every = target_linears(base.model)
    reason = names.unexportable(family, every)
    advised = reason and reason.partition("; leave them out with --target-modules ")[2].split()
    assert advised == (targets and sorted(targets))
    found = {"base": difference(mlx_logits(base.model), reference)}
    options = {"iters": 2, "calibration_samples": 2, "target_modules": targets}
    if experts:
        options["target_experts"] = True
        options["target_modules"] = targets and [
            *targets,
            *names.FAMILIES[family].experts.projections,
        ]
    run = quick_train(mlx_path, data_path, path / "run", **options)
    trained = mlx_logits(load_adapter(run).model)
    found["trained"] = difference(trained, reference)
    for export, logits in EXPORTS.items():
        found[export] = difference(logits(run, model_path, path / export), trained)
    return found


# Proven with older libraries too, which are all that Python 3.10 can have.
EARLY = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "smollm3"}


def installed(family):
    """Whether both libraries have the family, in versions as new as those of docs/MODELS.md."""
    from mlx_lm.utils import MODEL_REMAPPING
    from transformers import CONFIG_MAPPING

    if sys.version_info < (3, 11) and family not in EARLY:
        return False
    ours = importlib.util.find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(family, family)}")
    return ours is not None and family in CONFIG_MAPPING


def check_names(family, linears, model_path, theirs):
    """Names lead to the same numbers in the checkpoint and in transformers, and back again.

    Returns the paths inside a block.
    """
    tensors = load_file(model_path / "model.safetensors")
    modules = dict(theirs.named_modules())
    seen = []
    for name, linear in linears.items():
        hf = names.hf_weight(family, name)
        assert names.mlx_name(family, hf.module) == name
        ours = np.array(linear.weight)
        theirs = [tensors[hf.tensor], modules[hf.module].weight.detach()]
        for weight in theirs:
            weight = weight.T if hf.transposed else weight
            np.testing.assert_array_equal(ours, weight.numpy())
        seen.append(hf)
    for what in (0, 1):  # module, tensor
        assert len({hf[what] for hf in seen}) == len(seen)
    blocks = rf"{re.escape(names.FAMILIES[family].blocks)}\.\d+\."
    return {re.sub(blocks, "", name) for name in linears}


@pytest.mark.parametrize(
    ("family", "experts"),
    [(family, False) for family in FAMILIES] + [(family, True) for family in EXPERT_FAMILIES],
)
def test_round_trip(family, experts, data_path, tmp_path, monkeypatch):
    """On a CPU that looks like a Mac's GPU to mlx-lm, with kernels that have no gradient."""
    if not installed(family):
        pytest.skip(f"the installed mlx-lm or transformers is older than {family}")
    metal = Metal(monkeypatch)
    found = round_trip(family, data_path, tmp_path, experts)
    assert metal.launches() or family not in KERNEL_FAMILIES
    assert found.pop("trained") > 0.01
    assert max(found.values()) < TOLERANCE, found


def test_experts_of_a_4_bit_conversion_resumed(data_path, tmp_path):
    """From a checkpoint to the same bits as an uninterrupted run; no covariance is formed."""
    from mlx_lm.convert import convert

    settings = {"hidden_size": 64, "intermediate_size": 64}
    model_path = save_model(tmp_path / "original", "mixtral", **settings)
    conversion = tmp_path / "conversion"
    convert(str(model_path), str(conversion), quantize=True, q_bits=4, q_group_size=32)
    (conversion / "README.md").write_text(f"---\nbase_model: {model_path}\n---\n")
    options = {"calibration_samples": 4, "target_experts": True, "covariance": "streaming"}
    run_path = quick_train(conversion, data_path, tmp_path / "run", save_every=3, **options)
    run = read_run(run_path)
    experts = [name for name in run.plan.adapted() if ".switch_mlp." in name]
    assert len(experts) > 4
    (run_path / "adapters.safetensors").unlink()
    shutil.rmtree(run_path / "checkpoints" / "0000006")
    quick_train(conversion, data_path, run_path, save_every=3, resume=True, **options)
    resumed = read_run(run_path)
    assert resumed.tensors.keys() == run.tensors.keys()
    for key, tensor in run.tensors.items():
        assert mx.array_equal(tensor, resumed.tensors[key]).item(), key
    original = load_base_model(str(model_path)).model
    expected = mlx_logits(attach(original, run.plan, run.tensors))
    adapter = export_peft(run, tmp_path / "peft")
    assert difference(peft_logits(model_path, adapter), expected) < TOLERANCE
    assert difference(merged(run_path, model_path, tmp_path / "merged"), expected) < TOLERANCE
    conversions = mlx_logits(load_adapter(run_path).model)
    theirs = exported_to_mlx_lm(run_path, conversion, tmp_path / "mlx-lm")
    assert difference(theirs, conversions) < TOLERANCE


def test_experts_that_are_missing_or_cannot_be_exported(model_path, data_path, tmp_path):
    with pytest.raises(UserError, match="--target-experts: the model has no experts"):
        quick_train(model_path, data_path, tmp_path / "run", target_experts=True)
    llama4 = save_model(tmp_path / "llama4", "llama4")
    with pytest.raises(UserError, match=r"experts\.\w+\.0, .* and \d+ more \(PEFT .* \(in, out\)"):
        quick_train(llama4, data_path, tmp_path / "run", target_experts=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("targets", "num_layers"), [(["up_proj"], -1), (["down_proj"], 1), (["q_proj", "gate_proj"], 1)]
)
def test_some_matrices_of_experts(targets, num_layers, mixtral_path, data_path, tmp_path):
    """Gate or up without the other, only experts, only the last block."""
    options = {"target_experts": True, "target_modules": targets, "num_layers": num_layers}
    run = quick_train(mixtral_path, data_path, tmp_path / "run", iters=2, **options)
    expected = mlx_logits(load_adapter(run).model)
    assert difference(expected, logits_of(base_model(mixtral_path))) > 0.01
    for export, logits in EXPORTS.items():
        assert difference(logits(run, mixtral_path, tmp_path / export), expected) < TOLERANCE


def failure(family, path, **settings):
    """How a family of ``FAILS`` fails, or one of ``FAMILIES`` with other settings."""
    model_path = save_model(path, family, **settings)
    try:
        base = load_base_model(str(path_for_mlx(model_path, family)))
    except UserError as error:
        return f"mlx-lm's error: {str(error).split(': ', 1)[1]}"
    found = difference(mlx_logits(base.model), logits_of(base_model(model_path)))
    return f"logits differ by {found:.1g}" if found > TOLERANCE else None


@pytest.mark.parametrize("family", FAILS)
def test_families_that_do_not_work(family, tmp_path):
    """If one of these no longer fails, it can move to the matrix."""
    assert failure(family, tmp_path / "model")
    assert names.unexportable(family, [])


def test_every_known_family_is_tested_and_in_the_table():
    assert set(names.FAMILIES) == set(FAMILIES)
    assert set(FAILS) <= set(names.REFUSED)
    text = (ROOT / "docs" / "MODELS.md").read_text()
    table = text[text.index("| family | adapted") : text.index("## What the other side")]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == sorted(FAMILIES)
    lines = re.findall(r"^- (`.+?):", text[text.index("## What does not work") :], re.MULTILINE)
    assert set(re.findall(r"`([^`]+)`", " ".join(lines))) == set(names.REFUSED)


def test_every_model_of_mlx_lm_is_proven_or_refused_with_a_reason():
    from mlx_lm import models
    from mlx_lm.utils import MODEL_REMAPPING

    found = set(MODEL_REMAPPING)
    for file in Path(models.__path__[0]).glob("*.py"):
        classes = (node for node in ast.parse(file.read_text()).body if type(node) is ast.ClassDef)
        if "ModelArgs" in {node.name for node in classes}:
            found.add(file.stem)
    assert not names.FAMILIES.keys() & names.REFUSED.keys()
    assert not found - names.FAMILIES.keys() - names.REFUSED.keys()


MULTIMODAL = [name for name, family in names.FAMILIES.items() if family.is_multimodal]
# Where vLLM 0.32.0 binds none of the language model's own names, and where it has no LoRA.
UNBOUND_IN_VLLM = {"gemma3", "llama4", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"}
NOT_IN_VLLM = {"kimi_k25", "minimax_m3_vl"}


def modules_of(class_of, config):
    """The names of the modules of a class of transformers, without weights."""
    with torch.device("meta"):
        return set(dict(class_of.from_config(config).named_modules()))


def fault_in_vllm(family, modules):
    """What vLLM would do with a portable export that has these names."""
    plan = RankPlan(8, 8, {name: ModulePlan(8, 1.0, 0.0, 8, 8) for name in modules})
    adapter = Adapter(plan, {}, "peft", Path("a"), {"target_modules": []})
    found = {reading.reader: reading for reading in readings(adapter, family)}
    return found["vLLM from 0.32"].fault, found["vLLM from 0.32"].remedy


@pytest.mark.parametrize("family", MULTIMODAL)
def test_names_of_the_class_that_is_served_and_of_its_language_model(family):
    """Each class of transformers has every module by the names for it, which are all understood.

    Those of the whole model are bound in vLLM; those of the language model alone not everywhere.
    """
    if not installed(family):
        pytest.skip(f"the installed mlx-lm or transformers is older than {family}")
    table = names.FAMILIES[family]
    settings = {**COMMON, **FAMILIES[family].settings, **VARIANTS.get(family, {})}
    config = AutoConfig.for_model(family, **settings)
    whole = modules_of(AutoModelForImageTextToText, config)
    ours = {name: mlx for name in whole if (mlx := names.mlx_name(family, name))}
    kinds = {re.sub(r"^.+?\.\d+\.", "", mlx) for mlx in ours.values()}
    assert {"self_attn.o_proj", "mlp.down_proj"} & kinds or "feed_forward.down_proj" in kinds
    served = {mlx: names.hf_weight(family, mlx).module for mlx in ours.values()}
    assert set(served.values()) == set(ours)
    for spelling in ("model.layers", "language_model.model.layers", "model.language_model.layers"):
        for name, mlx in ours.items():
            assert names.mlx_name(family, name.replace(table.hf_blocks, spelling)) == mlx
    if family in NOT_IN_VLLM:
        assert fault_in_vllm(family, ours)[0] == f"loads no adapters for {family}"
    else:
        assert fault_in_vllm(family, ours) == (None, None)
    alone = {name.replace(table.hf_blocks, "model.layers") for name in ours}
    if family in UNBOUND_IN_VLLM:
        expected = "binds none of its modules", "--format peft"
        assert fault_in_vllm(family, alone) == expected
    elif family not in NOT_IN_VLLM:
        assert fault_in_vllm(family, alone) == (None, None)
    if table.text_blocks:
        text = modules_of(AutoModelForCausalLM, config.get_text_config())
        assert {names.hf_weight(family, mlx, text=True).module for mlx in served} == alone
        assert alone <= text


def test_names_of_a_model_without_such_a_class(tmp_path, model_path):
    run = make_run(tmp_path / "run", model_path, lambda *_: 2)
    with pytest.raises(UserError, match="--names text does nothing for family 'llama'"):
        tlora_mlx.export_peft(run, tmp_path / "text", names="text")
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("family", ["qwen3_5", "llama4"])
def test_the_language_model_alone_computes_the_same(family, tmp_path):
    """What AutoModelForCausalLM loads, with an export in its names."""
    path = save_model(tmp_path / "model", family)
    run = make_run(tmp_path / "run", path, lambda *_: 2)
    tlora_mlx.export_peft(run, tmp_path / "text", names="text")
    found = peft_logits(path, tmp_path / "text", text=True)
    assert difference(found, mlx_logits(load_adapter(run).model)) < TOLERANCE
    assert difference(found, logits_of(base_model(path))) > 0.01


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "starcoder2", "mixtral"])
def test_a_4_bit_conversion_for_its_original(family, data_path, tmp_path):
    """Calibrated and trained through quantized weights, right on the full-precision model."""
    from mlx_lm.convert import convert

    settings = {"hidden_size": 64, "intermediate_size": 128}
    model_path = save_model(tmp_path / "original", family, **settings)
    conversion = tmp_path / "conversion"
    convert(str(model_path), str(conversion), quantize=True, q_bits=4, q_group_size=32)
    card = f"---\nbase_model: {model_path}\n---\n"
    (conversion / "README.md").write_text(card)
    run_path = quick_train(conversion, data_path, tmp_path / "run", calibration_samples=4)
    run = read_run(run_path)
    original = load_base_model(str(model_path)).model
    base = mlx_logits(original)
    expected = mlx_logits(attach(original, run.plan, run.tensors))
    assert difference(expected, base) > 0.01
    for layout in ("portable", "compact"):
        adapter = export_peft(run, tmp_path / layout, layout)
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(model_path)
        assert difference(peft_logits(model_path, adapter), expected) < TOLERANCE
    assert difference(merged(run_path, model_path, tmp_path / "merged"), expected) < TOLERANCE


def test_refusals_before_any_training(model_path, data_path, tmp_path, tlora_here, monkeypatch):
    """A family or module without a name, and one whose export could not be right."""

    def refused(run, message):
        arguments = ("--model", model_path, "--data", data_path, "--adapter-path", run)
        result = tlora_here("train", *arguments, "--iters", 1)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
        assert "--allow-unexportable" in result.stderr
        assert not run.exists()
        return arguments

    linears = dict(names.FAMILIES["llama"].linears)
    del linears["mlp.up_proj"]
    with monkeypatch.context() as patch:
        patch.setitem(names.FAMILIES, "llama", names.Family(linears))
        refused(
            tmp_path / "module",
            "modules of family 'llama' are not known: model.layers.0.mlp.up_proj, model.layers.1",
        )
    with monkeypatch.context() as patch:
        patch.setitem(names.REFUSED, "llama", "it is another model here")
        refused(tmp_path / "reason", "'llama' cannot be exported: it is another model here")
    monkeypatch.delitem(names.FAMILIES, "llama")
    arguments = refused(tmp_path / "run", "names of model family 'llama' are not known")
    result = tlora_here("train", *arguments, "--iters", 1, "--allow-unexportable")
    assert result.returncode == 0
    assert "warning: the Hugging Face names of model family 'llama' are not known" in result.stdout
    result = tlora_here("export", tmp_path / "run")
    assert result.returncode == 2
    assert "family 'llama' are not known" in result.stderr


def test_a_table_that_is_not_one_to_one():
    with pytest.raises(ValueError, match="have the same name"):
        names.Family({"a.q": "b.q", "a.k": "b.q"})
    with pytest.raises(ValueError, match="have the same name"):
        names.Family({"a.q": "b.q", "a.k": "b.k"}, files={"b.q": "c", "b.k": "c"})


def test_nothing_outside_the_language_model_is_adapted(tmp_path):
    """A vision tower has layers of the same names, which PEFT would adapt too."""
    model_path = save_model(tmp_path / "model", "gemma3")
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2)
    adapter = export_peft(read_run(run), tmp_path / "peft", "portable")
    model = PeftModel.from_pretrained(base_model(model_path), adapter)
    adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert adapted
    assert not [name for name in adapted if "vision" in name]
    assert [name for name, _ in model.named_modules() if "vision" in name and "q_proj" in name]


@pytest.mark.parametrize("layout", ["portable", "compact"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_only_the_last_block_with_other_names(family, layout, tmp_path):
    model_path = save_model(tmp_path / "model", family)
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2, num_layers=1)
    adapter = export_peft(read_run(run), tmp_path / "peft", layout)
    theirs = peft_logits(model_path, adapter)
    assert difference(theirs, mlx_logits(load_adapter(run).model)) < TOLERANCE
    assert difference(theirs, logits_of(base_model(model_path))) > 0.01
    keys = load_file(adapter / "adapter_model.safetensors")
    assert not any(".0." in key for key in keys)
