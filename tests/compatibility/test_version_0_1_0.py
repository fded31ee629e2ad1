"""Files from version 0.1.0 are still read: runs, plans, checkpoints and exports.

``version_0_1_0/`` was made by that version on the shipped example, with PROJECT and RUNS in place
of its paths:

    tlora plan  --model examples/model --data examples/data --rank 2 \
        --target-modules v_proj o_proj --calibration-samples 16
    tlora train (the same) --iters 6 --save-every 2 --keep-checkpoints 3 --steps-per-report 2 \
        --steps-per-eval 3 --val-batches 2 --learning-rate 5e-3
    tlora export RUN --format peft --layout portable|compact --base-model examples/example-base
    tlora export RUN --format mlx-lm
    tlora export --adapter RUN:0.5 PEFT-COMPACT:0.5 --base-model examples/model --format run
"""

import hashlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.exports import export_merged, export_mlx_lm, export_peft
from helpers.paths import EXAMPLE, ROOT

from tlora_mlx import read_adapter, read_run, resolve_adapter
from tlora_mlx.training.planning import read_plan

KEPT = Path(__file__).parent / "version_0_1_0"


@pytest.fixture
def old(tmp_path):
    """All of them, with this machine's paths."""
    place = shutil.copytree(KEPT, tmp_path / "old")
    for path in place.rglob("*.json"):
        text = path.read_text().replace("PROJECT", str(ROOT)).replace("RUNS", str(place))
        path.write_text(text)
    return place


def files_of(directory):
    """What matters to readers: the bytes of tensors, the contents of configurations."""
    tensors = {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}
    return tensors | {p.name: json.loads(p.read_text()) for p in directory.glob("*.json")}


def test_a_plan(old, tlora_here, tmp_path):
    plan = read_plan(str(old / "plan.json"))
    assert plan == read_run(old / "run").plan
    assert [module.rank for module in plan.modules.values()] == [4, 2, 2, 2, 2, 1, 2, 1]
    arguments = ("--sensitivities", old / "plan.json", "--rank", 2, "--output", tmp_path / "p.json")
    assert tlora_here("plan", *arguments).returncode == 0
    assert json.loads((tmp_path / "p.json").read_text()) == plan.to_dict()


@pytest.mark.parametrize("layout", ["portable", "compact"])
def test_a_run_into_peft(old, tmp_path, layout):
    made = export_peft(old / "run", tmp_path / "new", layout, base_model="examples/example-base")
    assert files_of(made) == files_of(old / f"peft-{layout}")


def test_a_run_into_mlx_lm(old, tmp_path):
    assert files_of(export_mlx_lm(old / "run", tmp_path / "new")) == files_of(old / "mlx-lm")


def test_a_run_into_a_merged_model(old, tmp_path):
    """Another BLAS may round sums of floats differently."""
    merged = export_merged(old / "run", tmp_path / "new") / "model.safetensors"
    base, run = mx.load(str(EXAMPLE / "model/model.safetensors")), read_run(old / "run")
    for name, weight in mx.load(str(merged)).items():
        module = run.plan.modules.get(name.removesuffix(".weight"))
        if module is None:
            assert mx.array_equal(weight, base[name]).item()
            continue
        a, b = (run.tensors[name.replace("weight", f"lora_{k}")].astype(mx.float32) for k in "ab")
        expected = base[name].astype(mx.float32) + module.scale * (a @ b).T
        np.testing.assert_allclose(np.array(weight), np.array(expected), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["run", "peft-portable", "peft-compact", "mlx-lm", "combined"])
def test_every_adapter_gives_the_same_deltas(old, kind):
    """The same deltas, with MLX's names, whichever format they went through."""
    run = read_run(old / "run")
    adapter = resolve_adapter(read_adapter(old / kind), str(EXAMPLE / "model"))
    assert adapter.model == str(EXAMPLE / "model")
    assert adapter.model_type == run.model_type
    assert adapter.plan.modules.keys() == run.plan.modules.keys()
    for name, module in run.plan.adapted().items():
        deltas = [
            m.scale * np.array((t[f"{name}.lora_a"] @ t[f"{name}.lora_b"]).astype(mx.float32))
            for m, t in ((module, run.tensors), (adapter.plan.modules[name], adapter.tensors))
        ]
        np.testing.assert_allclose(*deltas, rtol=1e-5, atol=1e-8)


def test_an_interrupted_run_is_resumed(old, tlora_here):
    """From iteration 4, to what the run came to: the model, the data and the options are the same.

    On the machine that made it the bits are equal; elsewhere products may round otherwise.
    """
    cut, whole = old / "run", read_run(KEPT / "run").tensors
    shutil.rmtree(cut / "checkpoints/0000006")
    (cut / "adapters.safetensors").unlink()
    arguments = ("--model", EXAMPLE / "model", "--data", EXAMPLE / "data", "--adapter-path", cut)
    done = tlora_here("train", *arguments, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert "after iteration 4" in done.stdout
    for name, tensor in read_run(cut).tensors.items():
        wanted = np.array(whole[name].astype(mx.float32))
        np.testing.assert_allclose(np.array(tensor.astype(mx.float32)), wanted, atol=2e-4)
    state = json.loads((cut / "checkpoints/0000006/state.json").read_text())["progress"]
    kept = json.loads((KEPT / "run/checkpoints/0000006/state.json").read_text())["progress"]
    assert state["best_loss"] == pytest.approx(kept["best_loss"], abs=1e-3)
    same = ("iteration", "batches", "validated", "trained_tokens", "best_iteration", "finished")
    assert {key: state[key] for key in same} == {key: kept[key] for key in same}


def test_a_finished_run_stays_finished(old, tlora_here):
    before = {p: hashlib.sha256(p.read_bytes()).digest() for p in old.rglob("*") if p.is_file()}
    done = tlora_here("train", "--adapter-path", old / "run", "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert "is finished" in done.stdout
    after = {p: hashlib.sha256(p.read_bytes()).digest() for p in old.rglob("*") if p.is_file()}
    assert after == before


def test_other_options_are_refused(old, tlora_here):
    run = old / "run"
    refused = tlora_here("train", "--adapter-path", run, "--resume", "--learning-rate", "1e-3")
    assert refused.returncode == 2
    assert "--learning-rate 0.001 (it has 0.005)" in refused.stderr


def test_a_report_with_an_evaluation(old, tlora_here):
    assert tlora_here("report", old / "run").returncode == 0
    page = (old / "run/report.html").read_text()
    assert "perplexity" in page
    assert "219.7" in page
