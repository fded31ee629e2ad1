"""transformers and mlx-lm read merged models, which hold W + scale·B·A to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.adapters import make_run, zero_one_cap
from helpers.exports import export_merged
from helpers.logits import TOKENS, all_tensors, base_model, logits_of, mlx_lm_logits, mlx_logits
from helpers.models import save_model
from safetensors.torch import save_file
from transformers import AutoTokenizer

from tlora_mlx import RunError, UserError, load_adapter, read_run
from tlora_mlx.merging import dense as merge
from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.models.names import HFWeight
from tlora_mlx.storage.blocks import Scratch, decode, encode
from tlora_mlx.storage.files import write_json
from tlora_mlx.storage.safetensors import write_tensors

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def merged_by_torch(model_path, run):
    """W + scale · B A in float32, cast to the dtype of W: the definition, in torch."""
    run = read_run(run)
    tensors = all_tensors(model_path)
    for name, module in run.plan.adapted().items():
        a, b = (
            torch.from_numpy(np.array(run.tensors[f"{name}.{k}"].astype(mx.float32)))
            for k in ("lora_a", "lora_b")
        )
        weight = tensors[f"{name}.weight"]
        merged = weight.float() + module.scale * (b.T @ a.T)
        tensors[f"{name}.weight"] = merged.to(weight.dtype)
    return tensors


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Several files with an index, tied embeddings, a chat template, and files that others need."""
    whole = save_model(
        tmp_path_factory.mktemp("whole"), chat_template=TEMPLATE, tie_word_embeddings=True
    )
    path = tmp_path_factory.mktemp("sharded")
    base_model(whole).save_pretrained(path, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(whole).save_pretrained(path)
    (path / "LICENSE").write_text("do what you like")
    (path / "README.md").write_text("the card of another model")
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    (path / "pytorch_model.bin.index.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def sharded_run(sharded, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", sharded, zero_one_cap)


def test_a_sharded_checkpoint(sharded, sharded_run, tmp_path, capsys):
    out = export_merged(read_run(sharded_run), tmp_path / "merged")
    assert "verified 10 modules: max absolute error" in capsys.readouterr().out
    left_out = {"README.md", "pytorch_model.bin", "pytorch_model.bin.index.json"}
    names = {path.name for path in sharded.iterdir()} - left_out
    assert {path.name for path in out.iterdir()} == names
    assert len([name for name in names if name.startswith("model-0")]) > 3
    for name in names:
        one, other = (sharded / name).read_bytes(), (out / name).read_bytes()
        if not name.startswith("model-0"):
            assert one == other, name
        else:  # the same header: tensors, dtypes, shapes, places
            length = 8 + int.from_bytes(one[:8], "little")
            assert one[:length] == other[:length]
            assert len(one) == len(other)
    expected = merged_by_torch(sharded, sharded_run)
    got = all_tensors(out)
    assert got.keys() == expected.keys()
    assert "lm_head.weight" not in got
    adapted = read_run(sharded_run).plan.adapted()
    for name, tensor in got.items():
        if name.removesuffix(".weight") in adapted:
            assert (tensor - expected[name]).abs().max() < 1e-6
        else:
            assert torch.equal(tensor, expected[name])
    run_logits = mlx_logits(sharded_run)
    assert np.abs(logits_of(base_model(sharded)) - run_logits).max() > 0.5
    assert np.abs(logits_of(base_model(out)) - run_logits).max() < 1e-4
    assert np.abs(mlx_lm_logits(out) - run_logits).max() < 1e-4
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype, tmp_path):
    model_path = save_model(tmp_path / "model", dtype=dtype)
    run = make_run(tmp_path / "run", model_path, zero_one_cap)
    out = export_merged(read_run(run), tmp_path / "merged")
    expected, got = merged_by_torch(model_path, run), all_tensors(out)
    different = 0
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype == getattr(torch, dtype)
        # A sum in float32 that was taken in another order may fall to the other side of a tie.
        different += (tensor != expected[name]).sum().item()
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=2**-7, atol=1e-6)
    assert different <= 1e-4 * sum(tensor.numel() for tensor in got.values())
    logits = np.array(load_adapter(run).model(mx.array(TOKENS)).astype(mx.float32))
    assert np.abs(mlx_lm_logits(out) - logits).max() < 0.1 * np.abs(logits).max()


def test_a_weight_that_is_stored_transposed(model_path, tmp_path, monkeypatch):
    """Like Conv1D's: the family decides, not the shape, since a square one looks the same."""
    kept = r"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"  # square, and not
    tensors = all_tensors(model_path)
    for name in kept:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].T.contiguous()
    base = tmp_path / "base"
    base.mkdir()
    save_file(tensors, base / "model.safetensors")
    write_json(base / "config.json", {"model_type": "llama"})
    monkeypatch.setattr(
        merge,
        "hf_weight",
        lambda family, name: HFWeight(name, f"{name}.weight", name in kept),
    )
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 3)
    out = all_tensors(export_merged(read_run(run), tmp_path / "merged", str(base)))
    for name in kept:
        out[f"{name}.weight"] = out[f"{name}.weight"].T
    for name, expected in merged_by_torch(model_path, run).items():
        assert (out[name] - expected).abs().max() < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), generator=generator).to(torch.int32)
    ties = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16 + 2**15
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), torch.zeros(2)])
    values = values[values.isfinite()]
    stored = np.uint16 if dtype == torch.bfloat16 else np.float16
    out = np.empty(len(values), stored)
    with np.errstate(over="ignore"):
        encode(values.numpy().copy(), out, Scratch())
    expected = values.to(dtype)
    assert np.array_equal(out.view(np.int16), expected.view(torch.int16).numpy())
    assert np.array_equal(decode(out, np.empty(len(out), np.float32)), expected.float().numpy())


def test_the_command(tlora_here, run_path, model_path, tmp_path):
    """A run as trained, merged as a user would."""
    out = tmp_path / "merged"
    done = tlora_here("export", run_path, "--format", "merged", "--output", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"AutoModelForCausalLM.from_pretrained('{out}')" in done.stdout
    assert np.abs(logits_of(base_model(out)) - mlx_logits(run_path)).max() < 1e-4
    again = tlora_here("export", run_path, "--format", "merged", "--output", out)
    assert again.returncode == 2
    assert "already exists" in again.stderr


def big_run(place, layers):
    """A bf16 model made by hand (nothing loads it) with a largest tensor of 25 MB, and a run."""
    hidden, inner = 512, 2048
    kinds = {f"self_attn.{kind}_proj": (hidden, hidden) for kind in "qkvo"}
    kinds |= {f"mlp.{kind}_proj": (inner, hidden) for kind in ("gate", "up")}
    kinds["mlp.down_proj"] = (hidden, inner)
    shapes = {f"model.layers.{i}.{k}": s for i in range(layers) for k, s in kinds.items()}
    weights = {f"{name}.weight": mx.full(s, 0.5, mx.bfloat16) for name, s in shapes.items()}
    weights["model.embed_tokens.weight"] = mx.ones((24000, hidden), mx.bfloat16)
    run = place / "run"
    run.mkdir(parents=True)
    write_tensors(place / "model.safetensors", weights, {})
    placed = dict.fromkeys(weights, "model.safetensors")
    write_json(place / "model.safetensors.index.json", {"weight_map": placed})
    write_json(place / "config.json", {"model_type": "llama"})
    base = {"model": str(place), "base_model": str(place), "model_type": "llama"}
    write_json(run / "adapter_config.json", {"fine_tune_type": "tlora", **base})
    plan = {name: ModulePlan(8, 1.0, 1.0, *shape) for name, shape in shapes.items()}
    write_json(run / "rank_plan.json", RankPlan(8, 8, plan).to_dict())
    tensors = {f"{name}.lora_a": mx.ones((s[1], 8)) for name, s in shapes.items()}
    tensors |= {f"{name}.lora_b": mx.ones((8, s[0])) for name, s in shapes.items()}
    write_tensors(run / "adapters.safetensors", tensors, {})
    return run, sum(w.nbytes for w in weights.values()), max(w.nbytes for w in weights.values())


PEAK = """
import sys
import mlx.core as mx
import numpy as np
from pathlib import Path
from tlora_mlx import export_merged, read_run

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

mx.eval(mx.array(np.ones((64, 64), np.float32)) @ mx.ones((64, 64)))
before = peak()
export_merged(read_run(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak memory")
def test_memory_does_not_grow_with_the_model(tmp_path):
    peaks, models = [], []
    for layers in (3, 16):
        run, model, largest = big_run(tmp_path / str(layers), layers)
        command = [sys.executable, "-c", PEAK, run, tmp_path / f"merged-{layers}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]))
        models.append(model)
    assert models[1] > 3 * models[0] > 5 * largest
    assert max(peaks) < 3 * largest
    assert peaks[1] - peaks[0] < (models[1] - models[0]) / 10


@pytest.mark.parametrize("missing", ["base_model", "shape", "tensor", "quantized", "dtype"])
def test_a_base_that_does_not_fit(missing, model_path, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    tensors = all_tensors(model_path)
    config = json.loads((model_path / "config.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    messages = {
        "base_model": "its card names no original",
        "shape": rf"{name} has shape \(79, 48\), but the run was trained on \(80, 48\)",
        "tensor": f"it has no {name}",
        "quantized": "is quantized; name the full-precision one with --base-model",
        "dtype": f"{name} has dtype F8_E4M3, not F32, F16, BF16",
    }
    if missing == "shape":
        tensors[name] = tensors[name][1:].clone()
    elif missing == "tensor":
        del tensors[name]
    elif missing == "quantized":
        config["quantization_config"] = {"quant_method": "gptq"}
    elif missing == "dtype":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors")
    write_json(base / "config.json", config)
    named = None if missing == "base_model" else str(base)
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2, base_model=named)
    with pytest.raises(UserError, match=messages[missing]):
        export_merged(read_run(run), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_delta_that_overflows_the_dtype(tmp_path):
    model_path = save_model(tmp_path / "model", dtype="float16")
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2)
    plan = json.loads((run / "rank_plan.json").read_text())
    plan["modules"]["model.layers.1.mlp.up_proj"]["scale"] = 1e9
    write_json(run / "rank_plan.json", plan)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.* is not finite in float16"):
        export_merged(read_run(run), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_disk_that_fails_when_files_are_synced(model_path, tmp_path, monkeypatch):
    """Files are synced in the background; none may be lost without a word."""
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2)

    def failing(file):
        assert file.name == "model.safetensors"
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(merge, "sync", failing)
    with pytest.raises(RunError, match="merged: Input/output error"):
        export_merged(read_run(run), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


INDEXES = {
    "../model.safetensors": "outside the model's directory",
    "/etc/model.safetensors": "outside the model's directory",
    "model.bin": "which is not a safetensors file",
    "gone.safetensors": "is missing",
    "other.safetensors": "lm_head.weight is not in other.safetensors",
}


@pytest.mark.parametrize("shard", INDEXES)
def test_a_damaged_index(shard, model_path, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    tensors = all_tensors(model_path)
    save_file(tensors, base / "model.safetensors")
    save_file({"x": torch.ones(2)}, base / "other.safetensors")
    write_json(base / "config.json", {"model_type": "llama"})
    placed = dict.fromkeys(tensors, "model.safetensors") | {"lm_head.weight": shard}
    write_json(base / "model.safetensors.index.json", {"weight_map": placed})
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2)
    with pytest.raises(UserError, match=INDEXES[shard]):
        export_merged(read_run(run), tmp_path / "merged", str(base))


def test_tensors_in_two_files_and_pickled_weights(model_path, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    write_json(base / "config.json", {"model_type": "llama"})
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    run = read_run(make_run(tmp_path / "run", model_path, lambda i, shape: 2))
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\)"):
        export_merged(run, tmp_path / "merged", str(base))
    for name in ("model-a.safetensors", "model-b.safetensors"):
        save_file(all_tensors(model_path), base / name)
    with pytest.raises(UserError, match=r"is in model-a.safetensors and in model-b.safetensors"):
        export_merged(run, tmp_path / "merged", str(base))


def test_a_base_in_the_hub_clients_cache(model_path, tmp_path, monkeypatch):
    """huggingface_hub resolves a name: here from its cache, whose files are links."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    blobs = repository / "blobs"
    blobs.mkdir()
    for path in model_path.iterdir():
        (blobs / path.name).hardlink_to(path)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    run = make_run(tmp_path / "run", model_path, zero_one_cap, base_model="some/llama")
    out = export_merged(read_run(run), tmp_path / "merged")
    assert not any(path.is_symlink() for path in out.iterdir())
    assert np.abs(mlx_lm_logits(out) - mlx_logits(run)).max() < 1e-4
    with pytest.raises(UserError, match="model some/other is not a directory"):
        export_merged(read_run(run), tmp_path / "other", "some/other")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--layout", "compact", "--format", "merged"],
            "--layout cannot be used with --format merged",
        ),
        (
            ["--dtype", "float16", "--format", "merged"],
            "--dtype cannot be used with --format merged",
        ),
        (["--quantize"], "--quantize cannot be used with --format peft"),
        (
            ["--format", "mlx-lm", "--dequantize"],
            "--dequantize cannot be used with --format mlx-lm",
        ),
        (["--format", "merged", "--quantize", "--dequantize"], "cannot be used together"),
        (
            ["--format", "merged", "--quantize", "--base-model", "a/b"],
            "--base-model cannot be used",
        ),
        (["--format", "merged", "--quantize"], "is for runs on a quantized MLX model"),
    ],
)
def test_incompatible_merge_options(flags, message, tlora_here, run_path, tmp_path):
    done = tlora_here("export", run_path, "--output", tmp_path / "out", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_model_library_is_loaded(run_path, tmp_path):
    """Loading mlx-lm, and transformers with it, takes longer than merging a small model."""
    code = (
        "import sys\n"
        "from tlora_mlx.export import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "heavy = {'mlx_lm', 'transformers', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    arguments = [run_path, "--format", "merged", "--output", tmp_path / "merged"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
