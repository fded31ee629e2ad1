"""Any adapter directory is described, with the readers that would get it wrong."""

import re
import shutil

import pytest
from helpers.adapters import edit, make_run, mlx_lm_adapter, peft_adapter, zero_one_cap
from helpers.commands import assert_one_sentence, tlora
from helpers.exports import export_peft

from tlora_mlx import read_adapter, read_run
from tlora_mlx.adapters.readers import readings

READERS = ["PEFT", "vLLM", "SGLang", "llama.cpp", "TensorRT-LLM", "TGI"]


def faults(path):
    found = readings(read_adapter(path))
    assert [reading.reader for reading in found] == READERS
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
    assert "warning" not in out
    assert "vLLM needs --max-lora-rank 32" in out


def test_the_compact_layout_is_right_only_in_peft(run, tlora_here, tmp_path):
    export_peft(read_run(run), tmp_path / "peft", "compact")
    assert faults(tmp_path / "peft") == {
        "PEFT": None,
        "vLLM": "WRONG for 9 of 10 modules",  # one scale is 1 by chance: lora_alpha / r
        "SGLang": "does not load it: its ranks differ",
        "llama.cpp": "WRONG for 10 of 10 modules",
        "TensorRT-LLM": "WRONG for 10 of 10 modules",
        "TGI": "does not load it: its ranks differ",
    }
    name = "0.self_attn.v_proj"  # rank 24; the configuration's r and lora_alpha are 4
    assert scales(tmp_path / "peft", "PEFT", name) == 0.75
    assert scales(tmp_path / "peft", "vLLM", name) == 1
    assert scales(tmp_path / "peft", "llama.cpp", name) == scales(
        tmp_path / "peft", "TensorRT-LLM", name
    )
    assert scales(tmp_path / "peft", "llama.cpp", name) == 4 / 24
    out = tlora_here("inspect", tmp_path / "peft").stdout
    wrong = ", ".join(READERS[1:])
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
    assert found["TGI"] == "WRONG for 1 of 3 modules"
    assert scales(tmp_path / "gap", "TGI", "0.self_attn.o_proj") == 0
    assert scales(tmp_path / "gap", "TGI", "1.self_attn.q_proj") == 1.5
    assert found["SGLang"] == "does not load it: target_modules is a regex"
    assert not found["vLLM"]
    # The last block alone: no kind is in every block.
    peft_adapter(model_path, tmp_path / "last", layers_to_transform=[1], target_modules=["q_proj"])
    assert faults(tmp_path / "last")["TGI"] == "WRONG for 1 of 1 modules"


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
    assert "vLLM does not serve rank 600" in out
    shutil.rmtree(tmp_path / "peft")
    assert_one_sentence(tlora_here("inspect", tmp_path / "peft"), 2, "does not exist")
