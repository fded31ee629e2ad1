"""Reading an export back finds what was written wrongly, and then nothing is left behind."""

from functools import partial

import mlx.core as mx
import mlx_lm
import pytest
from helpers.adapters import make_run, zero_one_cap
from helpers.corruption import finds_every_wrong_write
from helpers.exports import (
    export_dequantized,
    export_merged,
    export_mlx_lm,
    export_peft,
    export_requantized,
)
from helpers.models import save_model

from tlora_mlx import Proof, RunError, read_run
from tlora_mlx.adapters import mlx_lm as our_mlx_lm
from tlora_mlx.adapters import peft
from tlora_mlx.adapters.proof import Errors
from tlora_mlx.storage.safetensors import write_tensors

ADAPTERS = {
    "portable": (peft, lambda run, out: export_peft(run, out, "portable")),
    "compact": (peft, lambda run, out: export_peft(run, out, "compact")),
    "half": (peft, lambda run, out: export_peft(run, out, "portable", "bfloat16")),
    "mlx-lm": (our_mlx_lm, export_mlx_lm),
}
MODELS = {
    "merged": export_merged,
    "dequantized": export_dequantized,
    "requantized": export_requantized,
}


def test_summary_names_the_worst_module_unless_every_error_is_zero(tmp_path):
    proof = Proof(tmp_path, {"q_proj": Errors(delta=3.0), "v_proj": Errors()})
    assert proof.summary() == "verified 2 modules: max absolute error 0 (relative 0)"
    proof.add("v_proj", Errors(largest=0.5, squares=0.25, delta=1.0))
    assert proof.summary() == (
        "verified 2 modules: max absolute error 0.5 in v_proj (relative 0.25)"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a 4-bit conversion whose original is known."""
    place = tmp_path_factory.mktemp("proof")
    original = save_model(place / "model", hidden_size=64, intermediate_size=96)
    mlx_lm.convert(str(original), str(place / "4bit"), quantize=True, q_bits=4, q_group_size=32)
    return read_run(make_run(place / "run", place / "4bit", zero_one_cap, base_model=str(original)))


@pytest.mark.parametrize("fault", ["entry", "missing", "scale"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_was_written_wrongly(kind, fault, run, tmp_path, monkeypatch, capsys):
    module, export = ADAPTERS[kind]

    def corrupted(path, tensors, metadata):
        tensors = dict(tensors)
        keys = [key for key in tensors if "layers.1.self_attn" in key and "lora_b" in key.lower()]
        keys = [key for key in keys if tensors[key].any()]
        key = keys[0]
        if fault == "entry":
            value = tensors[key].astype(mx.float32)
            value[0, 0] += 0.01 * mx.abs(value).max() + 0.02
            tensors[key] = value.astype(tensors[key].dtype)
        elif fault == "missing":
            del tensors[key]
        else:
            tensors[key] = tensors[key] * 1.1
        write_tensors(path, tensors, metadata)

    export(run, tmp_path / "right")
    assert "verified 10 modules: max absolute error" in capsys.readouterr().out
    monkeypatch.setattr(module, "write_tensors", corrupted)
    with pytest.raises(RunError, match=r"what was written for model\.layers\.1\.self_attn"):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_was_written_wrongly(kind, run, tmp_path, monkeypatch, capsys):
    """Each of many blocks is corrupted in turn, adapted or not."""
    MODELS[kind](run, tmp_path / "right")
    assert "verified 10 modules" in capsys.readouterr().out
    finds_every_wrong_write(
        partial(MODELS[kind], run),
        tmp_path,
        monkeypatch,
        more_than=10,
        match=r"what was written|damaged|not finite",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counted", "right"]
