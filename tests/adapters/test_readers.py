"""Any adapter directory is described, with the readers that would get it wrong."""

import re
import shutil

import pytest
from helpers.adapters import edit, make_run, mlx_lm_adapter, peft_adapter, zero_one_cap
from helpers.commands import assert_one_sentence, tlora
from helpers.exports import export_peft
from helpers.models import path_for_mlx, save_model
from safetensors.torch import load_file, save_file

from tlora_mlx import read_adapter, read_run
from tlora_mlx.adapters.readers import readings

PEFT, VLLM, OLDER_VLLM = "PEFT, transformers", "vLLM from 0.32", "vLLM before 0.32"
READERS = [PEFT, VLLM, OLDER_VLLM, "SGLang", "llama.cpp", "TGI"]


def faults(path, family=None):
    found = readings(read_adapter(path), family)
    assert [reading.reader for reading in found] == READERS
    helpless = [r for r in found if r.fault and r.fault.startswith("has no model")]
    assert all(bool(r.fault) == bool(r.remedy) or r in helpless for r in found)
    return {reading.reader: reading.fault for reading in found}


def scales(path, reader, name):
    found = {reading.reader: reading for reading in readings(read_adapter(path))}
    return found[reader].scales[f"model.layers.{name}"]


@pytest.fixture(scope="module")
def run(model_path, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("inspect") / "run", model_path, zero_one_cap)


def test_a_run(run, model_path):
    """Run as a process, since the standard library has a module of the same name."""
    result = tlora("inspect", run)
    assert (result.returncode, result.stderr) == (0, "")
    for line in (
        f"run of tlora_mlx.train in {run}",
        f"base model: {model_path}",
        "10 of 14 modules adapted, total rank 70, 2,608 trained parameters",
    ):
        assert line in result.stdout
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    size = f"A and B: 5,968 parameters, float32; {size / 1000:.1f} kB on disk"
    assert size in result.stdout
    assert re.search(r"^ +1 +– +1×1.5 +24×1.62 ", result.stdout, re.MULTILINE)
    assert "the scale is then 1, and vLLM needs --max-lora-rank 32" in result.stdout


def test_the_portable_layout_is_right_everywhere(run, tlora_here, tmp_path):
    export_peft(read_run(run), tmp_path / "peft")
    assert set(faults(tmp_path / "peft").values()) == {None}
    out = tlora_here("inspect", tmp_path / "peft").stdout
    assert f"PEFT LoRA adapter in {tmp_path / 'peft'}" in out
    assert len(re.findall(r"\b1 +as intended", out)) == len(READERS)
    assert re.search(r"vLLM from 0\.32 +0\.32\.0, run +1 ", out)
    assert "warning" not in out
    assert "is not checked" not in out
    assert "vLLM needs --max-lora-rank 32" in out


def test_the_compact_layout_is_right_where_patterns_are_honoured(run, tlora_here, tmp_path):
    export_peft(read_run(run), tmp_path / "peft", "compact")
    assert faults(tmp_path / "peft") == {
        PEFT: None,
        VLLM: None,
        OLDER_VLLM: "WRONG for 9 of 10 modules",  # one scale is 1 by chance: lora_alpha / r
        "SGLang": "does not load it: its ranks differ",
        "llama.cpp": "WRONG for 10 of 10 modules",
        "TGI": "does not load it: its ranks differ",
    }
    name = "0.self_attn.v_proj"  # rank 24; the configuration's r and lora_alpha are 4
    assert scales(tmp_path / "peft", PEFT, name) == 0.75
    assert scales(tmp_path / "peft", VLLM, name) == 0.75
    assert scales(tmp_path / "peft", OLDER_VLLM, name) == 1
    assert scales(tmp_path / "peft", "llama.cpp", name) == 4 / 24
    out = tlora_here("inspect", tmp_path / "peft").stdout
    wrong = ", ".join(READERS[2:])
    assert f"warning: {wrong} would not read this adapter as intended" in out
    assert f"python -m tlora_mlx export {tmp_path / 'peft'} --format peft" in out
    # The largest rank, 24, is above the configuration's.
    assert "vLLM needs --max-lora-rank 32" in out


def test_rank_stabilised_and_missing_kinds(model_path, tmp_path):
    peft_adapter(model_path, tmp_path / "rs", use_rslora=True, r=4, lora_alpha=6)
    found = faults(tmp_path / "rs")
    assert {reader for reader, fault in found.items() if fault} == {"SGLang", "llama.cpp"}
    assert scales(tmp_path / "rs", "TGI", "0.self_attn.q_proj") == 3
    assert scales(tmp_path / "rs", "SGLang", "0.self_attn.q_proj") == 1.5

    pattern = r".*\.(0\.self_attn\.[qo]_proj|1\.self_attn\.q_proj)"
    peft_adapter(model_path, tmp_path / "gap", target_modules=pattern)
    found = faults(tmp_path / "gap")
    assert found["TGI"] == "drops 1 of 3 modules"
    assert scales(tmp_path / "gap", "TGI", "0.self_attn.o_proj") == 0
    assert scales(tmp_path / "gap", "TGI", "1.self_attn.q_proj") == 1.5
    assert found["SGLang"] == "does not load it: target_modules is a regex"
    assert not found[VLLM]
    # The last block alone: no kind is in every block.
    peft_adapter(model_path, tmp_path / "last", layers_to_transform=[1], target_modules=["q_proj"])
    assert faults(tmp_path / "last")["TGI"] == "binds none of its modules"


@pytest.mark.parametrize(
    ("family", "experts", "wrong"),
    [
        (
            "gpt2",
            False,
            {
                VLLM: "loads no adapters for gpt2",
                OLDER_VLLM: "loads no adapters for gpt2",
                "SGLang": "binds none of its modules",  # no layers.N
                "llama.cpp": "loads no adapters for gpt2",
                "TGI": "binds none of its modules",
            },
        ),
        (
            "mixtral",
            True,
            {
                VLLM: "refuses experts, unless set up as in tlora_mlx's docs/MODELS.md",
                OLDER_VLLM: "refuses experts, unless set up as in tlora_mlx's docs/MODELS.md",
                "SGLang": "drops 16 of 24 modules",
                "llama.cpp": "refuses experts",
                "TGI": "drops 16 of 24 modules",
            },
        ),
        ("gpt_oss", True, {"llama.cpp": "refuses experts"}),
        # Kinds that some blocks lack, whatever the layout.
        ("lfm2", False, {"TGI": "binds none of its modules"}),
    ],
)
def test_what_a_family_cannot_be_given_as(family, experts, wrong, tlora_here, tmp_path):
    """The portable export's faults are the same with another export, so the advice is to merge."""
    model_path = save_model(tmp_path / "model", family)
    run = make_run(
        tmp_path / "run", path_for_mlx(model_path, family), lambda *_: 2, experts=experts,
        base_model=str(model_path),
    )  # fmt: skip
    export_peft(read_run(run), tmp_path / "peft")
    found = faults(tmp_path / "peft", family)
    assert {reader: found[reader] for reader in wrong} == wrong
    assert found[PEFT] is None
    everyone = ", ".join(reader for reader in READERS if found[reader])
    merged = f"for what they read: python -m tlora_mlx export {tmp_path / 'peft'} --format merged"
    out = tlora_here("inspect", tmp_path / "peft").stdout
    assert f"warning: {everyone} would not read this adapter as intended; {merged}" in out
    out = tlora_here("inspect", run).stdout
    assert f"but for {everyone}: python -m tlora_mlx export {run} --format merged" in out


def test_a_family_that_a_reader_does_not_have(tlora_here, tmp_path):
    """No export helps there."""
    model_path = save_model(tmp_path / "model", "recurrent_gemma")
    run = make_run(tmp_path / "run", model_path, lambda *_: 2)
    export_peft(read_run(run), tmp_path / "peft")
    found = faults(tmp_path / "peft", "recurrent_gemma")
    missing = {
        reader for reader, fault in found.items() if fault == "has no model 'recurrent_gemma'"
    }
    assert missing == {VLLM, OLDER_VLLM, "llama.cpp"}
    out = tlora_here("inspect", run).stdout
    assert "\nllama.cpp has no model 'recurrent_gemma'\n" in out
    assert not re.search("but for.*(llama.cpp|vLLM)", out)


def test_names_of_another_class_are_told(model_path, tlora_here, tmp_path):
    """vLLM 0.32.0, run with such an adapter, serves the base model and says nothing."""
    peft_adapter(model_path, tmp_path / "peft", target_modules=["q_proj", "o_proj"])
    assert "warning" not in tlora_here("inspect", tmp_path / "peft").stdout
    file = tmp_path / "peft" / "adapter_model.safetensors"
    wrapped = {
        k.replace("model.layers", "model.language_model.layers"): v
        for k, v in load_file(file).items()
    }
    save_file(wrapped, file)
    told = "4 of 4 modules are named as in a multimodal model (model.language_model.layers.0."
    assert told in tlora_here("inspect", tmp_path / "peft").stdout


def test_mlx_lm(model_path, tlora_here, tmp_path):
    mlx_lm_adapter(model_path, tmp_path / "mlx")
    out = tlora_here("inspect", tmp_path / "mlx").stdout
    assert f"mlx-lm adapter in {tmp_path / 'mlx'}" in out
    assert re.search(r"mlx-lm +2.5 +as intended", out)
    assert "the scale is then 1, and vLLM needs --max-lora-rank 8" in out


def test_no_base_model_is_needed_and_bad_paths_are_refused(model_path, tlora_here, tmp_path):
    peft_adapter(model_path, tmp_path / "peft", r=600, target_modules=["q_proj"])
    edit(tmp_path / "peft", base_model_name_or_path=None)
    out = tlora_here("inspect", tmp_path / "peft").stdout
    assert "base model: not named" in out
    assert "what depends on its family is not checked" in out
    assert "vLLM does not serve rank 600" in out
    shutil.rmtree(tmp_path / "peft")
    assert_one_sentence(tlora_here("inspect", tmp_path / "peft"), 2, "does not exist")
