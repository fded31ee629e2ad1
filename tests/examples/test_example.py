"""The files in examples/: complete, small, and enough to learn the task."""

import ast
import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.commands import quick_train, val_losses
from helpers.exports import export_peft
from helpers.paths import EXAMPLE
from mlx_lm.utils import load
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlora_mlx import load_adapter, read_run


def rows(split):
    return [json.loads(line) for line in (EXAMPLE / f"data/{split}.jsonl").open()]


def test_size_and_rows():
    files = [path for path in EXAMPLE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    assert {s: len(rows(s)) for s in ("train", "valid", "test")} == {
        "train": 600,
        "valid": 64,
        "test": 64,
    }
    completions = [row["completion"] for split in ("train", "valid", "test") for row in rows(split)]
    assert len(set(completions)) == len(completions)  # no test row is a training row too
    for code in completions:
        assert isinstance(ast.parse(code).body[0], ast.FunctionDef)


def test_the_tokenizer_gives_back_every_row():
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "model")
    for row in rows("test"):
        text = row["prompt"] + row["completion"]
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run, a fraction of the demo."""
    run = tmp_path_factory.mktemp("example") / "run"
    options = {"iters": 12, "rank": 8, "learning_rate": 3e-3, "calibration_samples": 16}
    return quick_train(EXAMPLE / "model", EXAMPLE / "data", run, val_batches=4, **options)


def test_it_learns(trained):
    losses = val_losses(trained)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("layout", ["portable", "compact"])
def test_the_adapter_in_peft_has_the_same_logits(trained, tmp_path, layout):
    tokenizer = load(str(EXAMPLE / "model"))[1]
    tokens = [tokenizer.encode("".join(rows("test")[0].values()))]
    expected = np.array(load_adapter(trained).model(mx.array(tokens)))
    base = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model", dtype=torch.float32)
    with torch.no_grad():
        before = base(torch.tensor(tokens)).logits.numpy()
        adapter = export_peft(read_run(trained), tmp_path / "peft", layout)
        after = PeftModel.from_pretrained(base, adapter)(torch.tensor(tokens)).logits.numpy()
    assert np.abs(after - expected).max() < 1e-4
    assert np.abs(before - expected).max() > 0.1
