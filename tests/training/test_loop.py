import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.commands import quick_train, tlora, val_losses
from helpers.loss import masked_cross_entropy
from helpers.models import ROWS, save_model, write_jsonl
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tlora_mlx import TrainConfig
from tlora_mlx.data.batches import batches_in_order, collate
from tlora_mlx.data.samples import Sample, Split
from tlora_mlx.method.output_layer import summed_loss
from tlora_mlx.training.loop import total_updates
from tlora_mlx.training.validation import evaluate, mean_loss

SAMPLES = [Sample([5, 9, 3, 7, 7, 2], 3), Sample([4, 8], 1), Sample(list(range(1, 40)), 10)]


def config(**options):
    return TrainConfig(model="m", data="d", **options)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_loss_against_numpy(dtype):
    """In double precision, token by token, from the logits in the model's dtype."""
    batch = collate(SAMPLES, 2048)
    mx.random.seed(0)
    logits = (4 * mx.random.normal((*batch.tokens.shape, 50))).astype(dtype)
    losses, counts = masked_cross_entropy(logits, *batch[:2])
    exact = np.array(logits.astype(mx.float32)).astype(np.float64)
    for n, (tokens, first, *_) in enumerate(SAMPLES):
        expected = [
            np.log(np.exp(exact[n, t - 1]).sum()) - exact[n, t - 1, tokens[t]]
            for t in range(first, len(tokens))
        ]
        assert counts[n].item() == len(expected)
        assert losses[n].sum().item() == pytest.approx(sum(expected), rel=1e-5)


def test_nothing_outside_of_the_span_reaches_the_loss():
    batch = collate(SAMPLES[:1], 2048)
    logits = mx.zeros((*batch.tokens.shape, 50))
    positions = mx.arange(1, batch.tokens.shape[1] + 1)[None, :, None]
    outside = (positions < 3) | (positions >= 6)
    poisoned = mx.where(outside, mx.nan, logits)
    losses, counts = masked_cross_entropy(poisoned, *batch[:2])
    assert counts.item() == 3
    assert losses.sum().item() == pytest.approx(3 * np.log(50), rel=1e-6)


@pytest.fixture(scope="module")
def model(model_path):
    model = load_model(model_path)[0]
    model.freeze()
    model.layers[0].self_attn.v_proj.unfreeze()
    return model


def test_four_micro_batches_weigh_as_one_batch(model):
    samples = [Sample([(7 * i + j) % 300 for j in range(4 + 5 * i)], 2) for i in range(8)]
    gradient = nn.value_and_grad(model, summed_loss)

    def total(batches):
        results = [gradient(model, *batch[:2]) for batch in batches]
        tokens = sum(n.item() for (_, n), _ in results)
        (key,) = [key for key, _ in tree_flatten(results[0][1])]
        return sum(dict(tree_flatten(g))[key] for _, g in results) / tokens

    whole = total([collate(samples, 2048)])
    parts = total(batches_in_order(samples, 2, 2048))
    assert mx.abs(whole - parts).max() / mx.abs(whole).max() < 1e-5


def test_evaluation_is_the_mean_over_tokens(model):
    sums = [summed_loss(model, *collate([s], 2048)[:2]) for s in SAMPLES]
    expected = sum(loss.item() for loss, _ in sums) / sum(n.item() for _, n in sums)
    batches = batches_in_order(SAMPLES, 2, 2048)
    assert mean_loss(model, batches, lambda: None) == pytest.approx(expected, rel=1e-5)
    assert evaluate(
        model, Split(SAMPLES), config(batch_size=2), "testing", limit=-1
    ) == pytest.approx(expected, rel=1e-5)
    only_first = sums[0][0].item() / sums[0][1].item()
    assert evaluate(
        model, Split(SAMPLES), config(batch_size=1), "testing", limit=1
    ) == pytest.approx(only_first, rel=1e-5)
    # Two of five, spread over the split: the first and the third.
    spread = (sums[0][0] + sums[2][0]).item() / (sums[0][1] + sums[2][1]).item()
    split = Split([SAMPLES[i] for i in (0, 1, 2, 1, 1)])
    assert evaluate(model, split, config(batch_size=2), "validating", limit=1) == pytest.approx(
        spread, rel=1e-5
    )


def test_epochs_count_every_sample(tmp_path, model_path, data_path):
    assert total_updates(13, config(epochs=2, batch_size=4)) == 8
    assert total_updates(13, config(epochs=2, batch_size=4, grad_accumulation_steps=3)) == 3
    assert total_updates(13, config(iters=7)) == 7
    run = quick_train(model_path, data_path, tmp_path / "run", epochs=2, steps_per_report=1)
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [r["trained_tokens"] for r in reports if "train_loss" in r]
    assert len(trained) == 8
    # 13 rows of which each has its completion's tokens and an end token in the loss, twice.
    from tlora_mlx.data.reading import load_data
    from tlora_mlx.models.base_model import load_base_model

    base = load_base_model(str(model_path))
    split = load_data(str(data_path), base.tokenizer, 2048, None)["train"]
    assert trained[-1] == 2 * sum(len(s.tokens) - s.first_target for s in split.samples)


def test_accumulation_equals_one_large_batch(tmp_path, model_path, data_path):
    def b_matrices(**options):
        name = "-".join(map(str, options.values()))
        run = quick_train(model_path, data_path, tmp_path / name, epochs=1, **options)
        return mx.load(str(run / "adapters.safetensors"))

    whole = b_matrices(batch_size=16)
    parts = b_matrices(batch_size=2, grad_accumulation_steps=8)
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert mx.abs(value - parts[key]).max().item() < 1e-4, key


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, model_path, data_path):
    """In separate processes: mlx-lm's checkpointing patches the block's class permanently."""
    tensors = []
    for flags in ([], ["--grad-checkpoint"]):
        run = tmp_path / f"run{len(flags)}"
        common = ["--model", model_path, "--data", data_path, "--iters", 5, "--rank", 4]
        assert tlora("train", *common, "--adapter-path", run, *flags).returncode == 0
        tensors.append(mx.load(str(run / "adapters.safetensors")))
    plain, checkpointed = tensors
    for key, value in plain.items():
        assert mx.abs(value - checkpointed[key]).max().item() < 1e-5, key


def test_a_loss_that_is_not_finite_never_reaches_the_weights(tmp_path, model_path, data_path):
    result = tlora(
        "train", "--model", model_path, "--data", data_path, "--adapter-path", tmp_path / "run",
        "--rank", 4, "--learning-rate", "1e30", "--optimizer", "adam", "--iters", 50,
    )  # fmt: skip
    assert result.returncode == 1
    assert "not finite in iteration" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "adapters.safetensors").exists()


def test_a_data_set_smaller_than_the_batch(tmp_path, model_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS[:1])
    run = quick_train(model_path, tmp_path / "data", tmp_path / "run", batch_size=8, iters=3)
    assert (run / "adapters.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_bases_train(tmp_path, data_path, dtype):
    model = save_model(tmp_path / "model", dtype=dtype)
    run = quick_train(model, data_path, tmp_path / "run", iters=30)
    losses = val_losses(run)
    assert losses[-1] < 0.8 * losses[0]
    tensors = mx.load(str(run / "adapters.safetensors"))
    assert {t.dtype for k, t in tensors.items() if k.endswith("lora_b")} == {mx.float32}
    assert {t.dtype for k, t in tensors.items() if k.endswith("lora_a")} == {getattr(mx, dtype)}
