"""Checkpoints of transformers 5 in plain mlx-lm, which does not read all of their settings."""

import importlib
import inspect
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.adapters import make_run
from helpers.exports import export_dequantized, export_merged
from helpers.logits import TOKENS, base_model, logits_of, mlx_logits
from helpers.models import save_model, write_jsonl

from tlora_mlx import read_run
from tlora_mlx.models import compatibility
from tlora_mlx.models.compatibility import OLDER_NAMES, missed_settings, shared_config

SETTINGS = {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0}}


def plain_logits(path):
    model, _ = mlx_lm.load(str(path))
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("rope")
    model_path = save_model(root / "model", hidden_size=64, intermediate_size=96, **SETTINGS)
    return make_run(root / "run", model_path, lambda i, shape: 2)


def test_the_warning(run, tmp_path, tlora_here):
    model = read_run(run).model
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    options = ("--model", model, "--data", tmp_path / "data", "--output", tmp_path / "plan.json")
    done = tlora_here("plan", *options)
    assert done.returncode == 0, done.stderr
    message = f"mlx_lm's own commands compute a different model from {model}"
    assert message in done.stdout
    assert 'add "rope_theta": 200.0' in done.stdout
    done = tlora_here("export", run, "--format", "mlx-lm", "--output", tmp_path / "adapter")
    assert message in done.stdout


def test_a_merged_model_is_the_same_in_both(run, tmp_path):
    expected = mlx_logits(run)
    out = export_merged(read_run(run), tmp_path / "merged")
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 200.0
    assert missed_settings(config) == {}
    assert np.abs(plain_logits(out) - expected).max() < 1e-4
    assert np.abs(logits_of(base_model(out)) - expected).max() < 1e-4
    del config["rope_theta"]  # as the base model's
    (out / "config.json").write_text(json.dumps(config))
    assert np.abs(plain_logits(out) - expected).max() > 0.1


def test_a_dequantized_model_is_too(run, tmp_path):
    quantized = tmp_path / "4bit"
    mlx_lm.convert(read_run(run).model, str(quantized), quantize=True, q_group_size=32)
    own = make_run(tmp_path / "run", quantized, lambda i, shape: 2, base_model=None)
    out = export_dequantized(read_run(own), tmp_path / "dense")
    assert np.abs(plain_logits(out) - mlx_logits(own)).max() < 1e-4


def test_settings_that_are_read_anyway_are_left_alone(model_path, tmp_path):
    run = make_run(tmp_path / "run", model_path, lambda i, shape: 2)
    out = export_merged(read_run(run), tmp_path / "merged")
    assert (out / "config.json").read_bytes() == (model_path / "config.json").read_bytes()


def test_mlx_lm_is_asked_only_about_settings_that_it_may_read(tmp_path, monkeypatch):
    """Its source tells, without the seconds that loading it takes: no field of it is overlooked."""
    names = {*OLDER_NAMES, "rope_theta", "partial_rotary_factor", "sliding_window_pattern"}
    read = 0
    for path in sorted(Path(mlx_lm.__file__).with_name("models").glob("*.py")):
        if path.stem == "olmo":  # it asks for another package
            continue
        module = importlib.import_module(f"mlx_lm.models.{path.stem}")
        if hasattr(module, "ModelArgs"):
            for name in names & inspect.signature(module.ModelArgs).parameters.keys():
                assert compatibility._may_read(path.stem, [name]), (path.stem, name)
                read += 1
    assert read > 100
    monkeypatch.setattr(compatibility, "_shared_config", None)  # it would be called
    config = {"model_type": "llama", "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
    assert shared_config(config, tmp_path) is None
    for other in ("gpt2", "mistral"):  # it reads one of them, and is found under another name
        with pytest.raises(TypeError):
            shared_config({**config, "model_type": other}, tmp_path)
