"""Runs on quantized models, merged into the original or into the model itself, dense or not."""

import json
import re
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.adapters import make_run, zero_one_cap
from helpers.exports import export_dequantized, export_merged, export_requantized
from helpers.logits import TOKENS, all_tensors, base_model, logits_of, mlx_lm_logits
from helpers.models import save_model

from tlora_mlx import Proof, RunError, UserError, load_adapter, read_run
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.merging import dequantize
from tlora_mlx.merging.conversion import read_conversion
from tlora_mlx.merging.quantized_proof import part_bytes, prove_weight
from tlora_mlx.method.layers import dense_weight
from tlora_mlx.storage.files import write_json
from tlora_mlx.storage.safetensors import write_tensors

MODES = {
    "affine4": {"q_bits": 4, "q_group_size": 64},
    "affine8": {"q_bits": 8, "q_group_size": 32},
    "mxfp4": {"q_bits": 4, "q_group_size": 32, "q_mode": "mxfp4"},
    "nvfp4": {"q_bits": 4, "q_group_size": 16, "q_mode": "nvfp4"},
    "mixed": {"q_bits": 4, "q_group_size": 64},
}


def mixed(path, module):
    """Quantize some modules with other settings, and some not at all."""
    if path.endswith("v_proj"):
        return {"bits": 6, "group_size": 32, "mode": "affine"}
    return not path.endswith(("k_proj", "norm")) and hasattr(module, "to_quantized")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    return save_model(path, dtype="bfloat16", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module", params=MODES)
def quantized_run(request, original, tmp_path_factory):
    path = tmp_path_factory.mktemp("conversions") / request.param
    predicate = {"quant_predicate": mixed} if request.param == "mixed" else {}
    settings = MODES[request.param]
    mlx_lm.convert(str(original), str(path), quantize=True, **settings, **predicate)
    return make_run(path.with_name("run"), path, zero_one_cap, base_model=None)


def run_logits(run):
    return np.array(load_adapter(run).model(mx.array(TOKENS)).astype(mx.float32))


def weights_of(path):
    """The dense weights that mlx-lm computes with, by module name."""
    model, _ = mlx_lm.load(str(path))
    named = model.named_modules()
    return {n: np.array(dense_weight(m)) for n, m in named if n.endswith("_proj")}


def deltas_of(run):
    def delta(name, scale):
        a, b = (run.tensors[f"{name}.{key}"].astype(mx.float32) for key in ("lora_a", "lora_b"))
        return scale * np.array(a @ b).T

    return {name: delta(name, module.scale) for name, module in run.plan.adapted().items()}


def test_dequantized(quantized_run, tmp_path):
    run = read_run(quantized_run)
    out = export_dequantized(run, tmp_path / "dense")
    config = json.loads((out / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()
    assert {str(t.dtype) for t in all_tensors(out).values()} == {"torch.bfloat16"}
    before, after, deltas = weights_of(run.config["model"]), weights_of(out), deltas_of(run)
    for name, weight in after.items():
        expected = before[name] + deltas.get(name, 0)
        assert np.abs(weight - expected).max() <= 2**-8 * np.abs(expected).max(), name
    expected = run_logits(quantized_run)
    tolerance = 0.1 * np.abs(expected).max()
    assert np.abs(mlx_lm_logits(out) - expected).max() < tolerance
    assert np.abs(logits_of(base_model(out)) - expected).max() < tolerance  # transformers
    assert np.abs(mlx_lm_logits(run.config["model"]) - expected).max() > 2 * tolerance


def test_dequantized_into_several_files(quantized_run, tmp_path, monkeypatch):
    whole = export_dequantized(read_run(quantized_run), tmp_path / "whole")
    monkeypatch.setattr(dequantize, "MAX_FILE", 30_000)
    out = export_dequantized(read_run(quantized_run), tmp_path / "dense")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {path.name for path in out.glob("*.safetensors")}
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(out).values())
    assert np.array_equal(logits_of(base_model(out)), logits_of(base_model(whole)))


def test_requantized(quantized_run, tmp_path, capsys):
    run = read_run(quantized_run)
    capsys.readouterr()
    out = export_requantized(run, tmp_path / "quantized")
    said = " ".join(capsys.readouterr().out.split())
    before, after, deltas = weights_of(run.config["model"]), weights_of(out), deltas_of(run)
    error, size, shares = 0.0, 0.0, {}
    for name, weight in after.items():
        change = weight - before[name]
        if name in deltas:
            delta = deltas[name]
            error, size = error + ((change - delta) ** 2).sum(), size + (delta**2).sum()
            shares[name] = (change * delta).sum() / (delta**2).sum()
        else:
            assert not change.any(), name
    least = min(shares, key=shares.get)
    assert shares[least] > 0.5
    total = sum(shares[n] * (deltas[n] ** 2).sum() for n in shares) / size
    overall, worst, name, relative = re.search(
        r"quantized again: ([\d.]+)% of the delta survives overall, ([\d.]+)% in ([\w.]+); "
        r"relative error ([\d.e-]+) ",
        said,
    ).groups()
    assert name == least
    assert float(overall) == pytest.approx(100 * total, abs=0.11)
    assert float(worst) == pytest.approx(100 * shares[least], abs=0.11)
    assert float(relative) == pytest.approx((error / size) ** 0.5, rel=0.06)
    # mlx-lm loads it as what it was: same files, same settings, same shapes.
    source = read_run(quantized_run).config["model"]
    assert (out / "config.json").read_text() == Path(source, "config.json").read_text()
    fine = "affine8" in source
    expected = run_logits(quantized_run)
    limit = (0.1 if fine else 0.6) * np.abs(expected).max()
    assert np.abs(mlx_lm_logits(out) - expected).max() < limit


def test_what_the_task_rounded_is_compared_by_its_digests(quantized_run, tmp_path):
    adapter = resolve_adapter(quantized_run)
    base, weights = read_conversion(adapter, "--quantize")
    for name, weight in weights.items():
        parts = part_bytes(weight.read(base.file_of))
        digests = [sha256(part).hexdigest() for part in parts]
        arguments = adapter, base, weight, base.file_of
        prove_weight(*arguments, {name: digests}, Proof(tmp_path))
        for i in range(len(digests)):
            others = [*digests[:i], sha256(b"other").hexdigest(), *digests[i + 1 :]]
            with pytest.raises(RunError, match=f"what was written for {name}"):
                prove_weight(*arguments, {name: others}, Proof(tmp_path))


def test_a_lost_delta_is_reported(original, tmp_path, capsys):
    """Far below the quantization steps, next to nothing survives."""
    path = tmp_path / "4bit"
    mlx_lm.convert(str(original), str(path), quantize=True, q_bits=4, q_group_size=64)
    run = make_run(tmp_path / "run", path, lambda i, shape: 2)
    tensors = dict(read_run(run).tensors)
    write_tensors(
        run / "adapters.safetensors",
        {k: 1e-4 * v if k.endswith("_b") else v for k, v in tensors.items()},
        {},
    )
    capsys.readouterr()
    export_requantized(read_run(run), tmp_path / "quantized")
    said = " ".join(capsys.readouterr().out.split())
    assert abs(float(re.search(r"relative error ([\d.e+-]+) ", said)[1])) > 0.9


def test_a_delta_beyond_the_range_of_the_scales_is_refused(tmp_path):
    original = save_model(
        tmp_path / "original", dtype="float16", hidden_size=64, intermediate_size=128
    )
    path = tmp_path / "4bit"
    mlx_lm.convert(str(original), str(path), quantize=True, q_bits=4, q_group_size=64)
    run = make_run(tmp_path / "run", path, lambda i, shape: 2)
    tensors = read_run(run).tensors
    large = {k: 1e7 * v if k.endswith("_b") else v for k, v in tensors.items()}
    write_tensors(run / "adapters.safetensors", large, {})
    with pytest.raises(UserError, match=r"_proj with its delta is not finite once quantized"):
        export_requantized(read_run(run), tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()


def test_into_the_full_precision_original(quantized_run, original, tmp_path, tlora_here):
    command = ("export", quantized_run, "--format", "merged", "--output", tmp_path / "merged")
    refused = tlora_here(*command)
    assert refused.returncode == 2
    assert "its card names no original; name the full-precision model with" in refused.stderr
    assert tlora_here(*command, "--base-model", original).returncode == 0
    run = read_run(quantized_run)
    before, after, deltas = weights_of(original), weights_of(tmp_path / "merged"), deltas_of(run)
    for name, weight in after.items():
        expected = before[name] + deltas.get(name, 0)
        assert np.abs(weight - expected).max() <= 2**-8 * np.abs(expected).max(), name
    config = read_run(quantized_run).config | {"base_model": str(original)}
    write_json(run.directory / "adapter_config.json", config)
    by_card = export_merged(read_run(quantized_run), tmp_path / "by-card")
    write_json(run.directory / "adapter_config.json", config | {"base_model": None})
    for path in by_card.iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()


def test_the_command(quantized_run, tmp_path, tlora_here):
    for flag, loader in (("--dequantize", "AutoModelForCausalLM"), ("--quantize", "mlx_lm.load")):
        out = tmp_path / flag
        done = tlora_here("export", quantized_run, "--format", "merged", flag, "--output", out)
        assert (done.returncode, done.stderr) == (0, "")
        assert loader in done.stdout


def test_a_conversion_that_contradicts_its_config(original, tmp_path):
    path = tmp_path / "4bit"
    mlx_lm.convert(str(original), str(path), quantize=True, q_bits=4, q_group_size=64)
    run = make_run(tmp_path / "run", path, lambda i, shape: 2)
    config = json.loads((path / "config.json").read_text())
    for settings, message in (
        ({"bits": 8, "group_size": 64}, "not quantized as its config.json says"),
        ({"bits": 4, "group_size": "64"}, "is for runs on a quantized MLX model"),
        ({"quant_method": "gptq"}, "is for runs on a quantized MLX model"),
    ):
        write_json(path / "config.json", config | {"quantization": settings})
        for export in (export_dequantized, export_requantized):
            with pytest.raises(UserError, match=message):
                export(read_run(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()
