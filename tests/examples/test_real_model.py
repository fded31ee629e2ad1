"""A real language model, through everything: SmolLM2-135M-Instruct, dense and in exact 4 bit."""

import json
import os
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import without_effect
from helpers.commands import quick_train, val_losses
from helpers.llama_cpp import LlamaCpp
from helpers.models import write_jsonl
from helpers.paths import EXAMPLE, ROOT
from mlx_lm import generate, load

import tlora_mlx
from tlora_mlx import (
    UserError,
    evaluate,
    export_gguf,
    export_gguf_adapter,
    load_adapter,
    read_run,
)

sys.path.insert(0, str(ROOT / "scripts"))
from get_real_model import real_model

WANTED = os.environ.get("TLORA_REAL_MODEL")
pytestmark = pytest.mark.skipif(
    not WANTED, reason="set TLORA_REAL_MODEL=1, or to a directory, to fetch a real model (93 MB)"
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
OPTIONS = {"batch_size": 2, "calibration_samples": 4, "val_batches": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def real():
    try:
        return real_model(None if WANTED == "1" else Path(WANTED))
    except UserError as error:  # it is not on this machine, and cannot be had
        return pytest.skip(str(error))


@pytest.fixture(scope="module")
def run(real, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "run"
    return quick_train(real / "dense", EXAMPLE / "data", path, iters=4, **OPTIONS)


def next_tokens(path, count):
    model, tokenizer = load(str(path))[:2]
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    return prompt, generate(model, tokenizer, prompt, max_tokens=count)


def test_it_is_one_model_in_two_forms(real):
    config = json.loads((real / "4bit" / "config.json").read_text())
    if "model.embed_tokens" not in config["quantization"]:
        pytest.skip("this one is from the Hub, where 4 bits round it")
    dense = mx.load(str(real / "dense" / "model.safetensors"))
    stored = mx.load(str(real / "4bit" / "model.safetensors"))
    for name, weight in dense.items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" in stored:
            parts = stored[name], stored[f"{module}.scales"], stored[f"{module}.biases"]
            bits = config["quantization"].get(module, {"bits": 4})["bits"]
            assert mx.array_equal(mx.dequantize(*parts, group_size=32, bits=bits), weight), name
        else:
            assert mx.array_equal(stored[name], weight), name
    for form in ("dense", "4bit"):
        assert next_tokens(real / form, 8)[1] == "The capital of France is Paris."


def test_from_training_to_llama_cpp(run, real, tmp_path):
    assert val_losses(run)[-1] < val_losses(run)[0] - 0.1
    loaded = load_adapter(run)
    prompt = loaded.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    expected = np.array(loaded.model(mx.array([prompt])))[0]
    text = generate(loaded.model, loaded.tokenizer, prompt, max_tokens=40)
    export_gguf(run, tmp_path / "merged", outtype="f32")
    export_gguf_adapter(run, tmp_path / "adapter")
    export_gguf(without_effect(read_run(run)), tmp_path / "base", outtype="f32")
    base, adapter = tmp_path / "base/model.gguf", tmp_path / "adapter/adapter.gguf"
    plain = LlamaCpp(base).logits(prompt)
    assert np.abs(plain - expected).max() > 0.1
    for read in (LlamaCpp(tmp_path / "merged/model.gguf"), LlamaCpp(base, adapter)):
        rendered = loaded.tokenizer.apply_chat_template(
            QUESTION, add_generation_prompt=True, tokenize=False
        )
        assert read.tokens(rendered) == prompt
        assert np.abs(read.logits(prompt) - expected).max() < 1e-3
        tokens = read.greedy(prompt, 40)
        assert loaded.tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_a_run_on_4_bits_merges_onto_the_dense_original(real, tmp_path):
    """With a handful of tokens: on a CPU, MLX's quantized products are slow."""
    for split in ("train", "valid"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": "One two three"}] * 2)
    options = {"batch_size": 1, "calibration_samples": 2, "learning_rate": 1e-3, "iters": 2}
    run = quick_train(real / "4bit", tmp_path, tmp_path / "run", **options)
    assert val_losses(run)[-1] < val_losses(run)[0]
    result = evaluate(
        run=run, task="perplexity", data=tmp_path / "valid.jsonl", batch_size=1, quiet=True
    )
    assert result.adapter["loss"] == pytest.approx(val_losses(run)[-1], rel=1e-3)
    assert result.adapter["loss"] < result.base["loss"]
    tlora_mlx.export_peft(run, tmp_path / "peft")
    named = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert Path(named["base_model_name_or_path"]) == (real / "dense").resolve()
    tlora_mlx.export_merged(run, tmp_path / "merged")
    loaded = load_adapter(run)
    tokens = mx.array([loaded.tokenizer.encode("One two")])
    merged, _ = load(str(tmp_path / "merged"))
    assert mx.abs(merged(tokens) - loaded.model(tokens)).max().item() < 1e-3
