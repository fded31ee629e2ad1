"""mlx-lm itself reads the mlx-lm adapter and the run: load, and generate, fuse and server."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.adapters import make_run, zero_one_cap
from helpers.exports import export_mlx_lm
from helpers.logits import TOKENS, mlx_logits
from helpers.models import save_model
from mlx_lm import generate
from safetensors import safe_open

import tlora_mlx
from tlora_mlx import load_adapter, read_run
from tlora_mlx.method.layers import adapters_off

PROMPT = "Add 3 and 4.\n"


def logits(model_path, adapter=None):
    model, _ = mlx_lm.load(str(model_path), adapter_path=adapter and str(adapter))
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


@pytest.fixture(scope="module")
def mixed_run(model_path, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("mixed") / "run", model_path, zero_one_cap)


@pytest.fixture(scope="module")
def adapter(mixed_run, tmp_path_factory):
    return export_mlx_lm(read_run(mixed_run), tmp_path_factory.mktemp("adapter") / "mlx-lm")


@pytest.fixture(scope="module")
def run(mixed_run, tmp_path_factory):
    """The same adapter as a run directory that this version writes."""
    path = tmp_path_factory.mktemp("runs") / "run"
    return tlora_mlx.export_run(read_run(mixed_run), path).directory


def test_a_finished_run_in_stock_mlx_lm(model_path, run_path):
    """The directory that train wrote, as it is; and this package still reads exact ranks."""
    written = mx.load(str(run_path / "adapters.safetensors"))
    ranks = {name: module.rank for name, module in read_run(run_path).plan.modules.items()}
    assert len(set(ranks.values())) > 1
    assert {t.shape[1] for key, t in written.items() if key.endswith("a")} == {max(ranks.values())}
    read = read_run(run_path).tensors
    assert {name: read[f"{name}.lora_b"].shape[0] for name in ranks if ranks[name]} == {
        name: rank for name, rank in ranks.items() if rank
    }
    expected = mlx_logits(run_path)
    assert np.abs(logits(model_path) - expected).max() > 0.01
    assert np.abs(logits(model_path, run_path) - expected).max() < 1e-4


def test_a_run_of_experts_in_stock_mlx_lm(tmp_path):
    model_path = save_model(tmp_path / "model", "mixtral")
    mixed = make_run(tmp_path / "mixed", model_path, zero_one_cap, experts=True)
    run = tlora_mlx.export_run(read_run(mixed), tmp_path / "run").directory
    assert np.abs(logits(model_path, run) - mlx_logits(mixed)).max() < 1e-4
    assert np.abs(mlx_logits(run) - mlx_logits(mixed)).max() < 1e-4


def test_ranks_0_1_and_the_cap(model_path, mixed_run, adapter):
    expected = mlx_logits(mixed_run)
    assert np.abs(logits(model_path) - expected).max() > 0.5
    assert np.abs(logits(model_path, adapter) - expected).max() < 1e-4


def test_written_tensors_and_configuration(model_path, mixed_run, adapter):
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", -1)
    assert config["model"] == str(model_path)
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"], parameters["dropout"]) == (24, 1.0, 0.0)
    assert parameters["keys"] == [
        *(f"mlp.{kind}_proj" for kind in ("down", "gate", "up")),
        *(f"self_attn.{kind}_proj" for kind in "koqv"),
    ]
    with safe_open(adapter / "adapters.safetensors", "np") as file:
        assert len(file.keys()) == 2 * len(read_run(mixed_run).plan.modules)
        for key in file.keys():  # noqa: SIM118 (no mapping)
            shape = file.get_slice(key).get_shape()
            assert shape[1 if key.endswith("lora_a") else 0] == 24


def test_only_the_last_blocks(model_path, tmp_path):
    run = make_run(tmp_path / "run", model_path, lambda i, s: i % 3, num_layers=1)
    config = json.loads((run / "adapter_config.json").read_text()) | {"num_layers": 1}
    (run / "adapter_config.json").write_text(json.dumps(config))
    adapter = export_mlx_lm(read_run(run), tmp_path / "mlx-lm")
    assert np.abs(logits(model_path, adapter) - mlx_logits(run)).max() < 1e-4
    model, _ = mlx_lm.load(str(model_path), adapter_path=str(adapter))
    assert not any("layers.0" in name for name, m in model.named_modules() if "lora_a" in m)


def test_on_a_quantized_model(tmp_path):
    model_path = save_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    quantized = tmp_path / "4bit"
    mlx_lm.convert(str(model_path), str(quantized), quantize=True, q_bits=4, q_group_size=32)
    run = make_run(tmp_path / "run", quantized, zero_one_cap, base_model=None)
    adapter = export_mlx_lm(read_run(run), tmp_path / "mlx-lm")
    expected = np.array(load_adapter(run).model(mx.array(TOKENS)).astype(mx.float32))
    assert np.abs(logits(quantized, adapter) - expected).max() < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("bfloat16", 2e-1)])
def test_dtypes(model_path, mixed_run, tmp_path, dtype, tolerance):
    adapter = export_mlx_lm(read_run(mixed_run), tmp_path / "mlx-lm", dtype)
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(mx, dtype)}
    assert np.abs(logits(model_path, adapter) - mlx_logits(mixed_run)).max() < tolerance


def mlx_lm_command(name, *arguments):
    return [sys.executable, "-m", "mlx_lm", name, *map(str, arguments)]


def test_generate(model_path, mixed_run, run, tlora_here):
    """mlx-lm's greedy text equals that of tlora generate."""
    done = tlora_here("generate", mixed_run, "--prompt", PROMPT, "--max-tokens", 12)
    assert done.returncode == 0
    base_text, text = done.stdout.split(f"--- with the adapter {mixed_run}\n")
    text = text.removesuffix("\n")
    assert len(text) > 5
    assert text not in base_text
    command = mlx_lm_command(
        "generate", "--model", model_path, "--adapter-path", run, "--max-tokens", 12
    )
    command += ["--prompt", PROMPT, "--temp", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("==========\n")[1].removesuffix("\n") == text


def test_fuse(model_path, mixed_run, run, tmp_path):
    command = mlx_lm_command(
        "fuse", "--model", model_path, "--adapter-path", run, "--save-path", tmp_path / "fused"
    )
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert np.abs(logits(tmp_path / "fused") - mlx_logits(mixed_run)).max() < 1e-4


def test_server(model_path, mixed_run, run, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = mlx_lm_command(
        "server", "--model", model_path, "--adapter-path", run, "--port", port, "--temp", "0"
    )
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer, end = None, time.monotonic() + 180
        while not answer and time.monotonic() < end:
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.load(response)
            except OSError:  # not up yet
                time.sleep(0.5)
        assert answer, (tmp_path / "log").read_text()
    finally:
        server.terminate()
        server.wait(60)
    loaded = load_adapter(mixed_run)
    expected = generate(loaded.model, loaded.tokenizer, PROMPT, max_tokens=8)
    assert answer["choices"][0]["text"] == expected
    with adapters_off(loaded.model):
        assert generate(loaded.model, loaded.tokenizer, PROMPT, max_tokens=8) != expected
