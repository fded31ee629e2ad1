"""Updates compared with torch's optimizers, over a whole run: schedule, clipping and decay too."""

from itertools import islice

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from helpers.models import save_model
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tlora_mlx import TrainConfig
from tlora_mlx.data.batches import collate
from tlora_mlx.data.samples import Sample, Split
from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.method.layers import adapter_tensors, attach, linear_shape, restore_b, target_linears
from tlora_mlx.method.output_layer import summed_loss
from tlora_mlx.runs.recorder import Recorder
from tlora_mlx.training import loop, session
from tlora_mlx.training import step as step_of_training
from tlora_mlx.training.loop import Training, training_batches
from tlora_mlx.training.step import Step, make_optimizer

UPDATES, WARMUP = 7, 0.3  # 2.1 updates, so 3
FACTORS = {  # of the peak rate, update by update
    "cosine": [1 / 3, 2 / 3, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5],
    "linear": [1 / 3, 2 / 3, 1, 1, 3 / 4, 2 / 4, 1 / 4],
    "constant": [1 / 3, 2 / 3, 1, 1, 1, 1, 1],
}
SAMPLES = [
    Sample([(7 * i + 3 * n) % 300 for i in range(length)], first)
    for n, (length, first) in enumerate([(30, 3), (12, 4), (21, 20), (9, 1), (17, 5)])
]


def adapted(path):
    """The tiny Llama with adapters on two kinds of modules, and a B that is not zero."""
    model = load_model(path)[0]
    mx.random.seed(3)
    modules, tensors = {}, {}
    for name, linear in target_linears(model, suffixes=["v_proj", "down_proj"]).items():
        out_features, in_features = linear_shape(linear)
        modules[name] = ModulePlan(3, 2.0, 1.0, out_features, in_features)
        tensors[f"{name}.lora_a"] = 0.3 * mx.random.normal((in_features, 3))
        tensors[f"{name}.lora_b"] = 0.3 * mx.random.normal((3, out_features))
    return attach(model, RankPlan(3, 6, modules), tensors)


def mean_gradients(model, batches):
    """∂(mean loss over the counted tokens of all batches)/∂B, by name."""
    sums, tokens = {}, 0.0
    for samples in batches:
        (_, n), tree = nn.value_and_grad(model, summed_loss)(model, *collate(samples, 2048)[:2])
        tokens += n.item()
        for name, gradient in tree_flatten(tree):
            sums[name] = sums.get(name, 0.0) + np.array(gradient, np.float64)
    return {name: gradient / tokens for name, gradient in sums.items()}


@pytest.mark.parametrize(
    ("optimizer", "decay", "schedule", "clip", "accumulation"),
    [
        ("adamw", 0.3, "cosine", 0.05, 1),
        ("adamw", 0.3, "linear", 0.0, 2),
        ("adam", 0.0, "constant", 0.05, 1),
    ],
)
def test_a_run_against_torch(model_path, optimizer, decay, schedule, clip, accumulation):
    config = TrainConfig(
        model="m", data="d", iters=UPDATES, batch_size=2, learning_rate=0.02, warmup=WARMUP,
        optimizer=optimizer, weight_decay=decay, lr_schedule=schedule, max_grad_norm=clip,
        grad_accumulation_steps=accumulation, steps_per_report=1,
    )  # fmt: skip
    model, other = adapted(model_path), adapted(model_path)
    other.train()
    b = {
        name: torch.tensor(np.array(tensor, np.float64), requires_grad=True)
        for name, tensor in adapter_tensors(other).items()
        if name.endswith("lora_b")
    }
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam
    theirs = kind(b.values(), lr=0.02, weight_decay=decay)
    batches, clipped, norms = training_batches(SAMPLES, config, 0), 0, []
    for factor in FACTORS[schedule]:
        gradients = mean_gradients(other, [next(batches) for _ in range(accumulation)])
        for name, tensor in b.items():
            tensor.grad = torch.tensor(gradients[name])
        norms.append(torch.nn.utils.clip_grad_norm_(b.values(), clip or float("inf")).item())
        clipped += bool(clip) and norms[-1] > clip
        theirs.param_groups[0]["lr"] = 0.02 * factor
        theirs.step()
        restore_b(other, {name: mx.array(t.detach().float().numpy()) for name, t in b.items()})

    class Reports(Recorder):
        def __init__(self):
            self.norms, self.rates = [], []

        def report(self, metrics):
            self.norms.append(metrics["grad_norm"])
            self.rates.append(metrics["learning_rate"])

    start = adapter_tensors(model)
    reports = Reports()
    Training(
        model, make_optimizer(config, model), Split(SAMPLES), Split(), config, recorder=reports
    ).fit()
    assert reports.rates == pytest.approx([0.02 * factor for factor in FACTORS[schedule]])
    assert reports.norms == pytest.approx(norms, rel=1e-3)  # before clipping
    assert clipped == (UPDATES if clip else 0)
    for name, tensor in b.items():
        expected, found = tensor.detach().numpy(), np.array(adapter_tensors(model)[name])
        moved = np.abs(expected - np.array(start[name])).max()
        assert np.abs(found - expected).max() < 2e-3 * moved, name


def test_every_update_is_made_in_training_mode(model_path, monkeypatch):
    """After a validation, which is made in evaluation mode, too."""
    model, modes = adapted(model_path), []
    config = TrainConfig(model="m", data="d", iters=3, batch_size=2, steps_per_eval=1)

    class Watched(loop.Step):
        def __call__(self, *arguments):
            modes.append(model.training)
            return super().__call__(*arguments)

    monkeypatch.setattr(loop, "Step", Watched)
    data = Split(SAMPLES)
    Training(model, make_optimizer(config, model), data, data, config).fit()
    assert modes == [True] * 3


def test_reports_are_of_the_updates_since_the_last(model_path):
    """Three updates that change next to nothing, reported after the second and at the end."""
    config = TrainConfig(
        model="m", data="d", iters=3, batch_size=2, steps_per_report=2, learning_rate=1e-9
    )
    model, reports = adapted(model_path), []
    batches = [collate(b, 2048) for b in islice(training_batches(SAMPLES, config, 0), 3)]
    sums = [[x.item() for x in summed_loss(model, *batch[:2])] for batch in batches]

    class Reports(Recorder):
        def report(self, metrics):
            reports.append(metrics)

    optimizer = make_optimizer(config, model)
    Training(model, optimizer, Split(SAMPLES), Split(), config, recorder=Reports()).fit()
    assert [report["iteration"] for report in reports] == [2, 3]
    losses, tokens = zip(*sums, strict=True)
    expected = [sum(losses[:2]) / sum(tokens[:2]), losses[2] / tokens[2]]
    assert [report["train_loss"] for report in reports] == pytest.approx(expected, rel=1e-5)
    assert [report["trained_tokens"] for report in reports] == [sum(tokens[:2]), sum(tokens)]


def test_the_test_loss_is_of_every_sample(model_path):
    """However few ``--val-batches`` are."""
    config = TrainConfig(model="m", data="d", batch_size=1, val_batches=1, test=True)
    model, data = adapted(model_path), Split(SAMPLES)
    sums = [summed_loss(model, *collate([sample], 2048)[:2]) for sample in SAMPLES]
    expected = sum(loss.item() for loss, _ in sums) / sum(n.item() for _, n in sums)
    training = Training(model, make_optimizer(config, model), data, Split(), config)
    assert session._test_loss(training, data) == pytest.approx(expected, rel=1e-5)


def test_early_stopping_counts_from_the_best(model_path, monkeypatch):
    """Losses that fall, rise, fall again and rise twice: the first rise is forgotten."""
    config = TrainConfig(model="m", data="d", iters=9, batch_size=2, steps_per_eval=1, early_stop=2)
    losses = iter([9.0, 3.0, 4.0, 2.0, 5.0, 2.5, 1.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(losses))
    model, data = adapted(model_path), Split(SAMPLES)
    training = Training(model, make_optimizer(config, model), data, data, config)
    training.fit()
    found = training.progress
    assert (found.iteration, found.best_iteration, found.best_loss) == (5, 3, 2.0)
    assert (found.first_val_loss, found.stale) == (9.0, 2)


def test_a_resumed_run_goes_on_where_the_data_was():
    samples = [Sample([n, n + 1], 1, n) for n in range(12)]
    for epochs in (3, None):
        config = TrainConfig(model="m", data="d", batch_size=2, epochs=epochs)
        whole = list(islice(training_batches(samples, config, 0), 18))
        assert len({str(whole[i : i + 6]) for i in (0, 6, 12)}) == 3  # each epoch has its order
        for start in range(18):
            rest = training_batches(samples, config, start)
            assert list(islice(rest, 18 - start)) == whole[start:]
            assert (next(rest, None) is None) == bool(epochs)


def test_dropout_is_drawn_anew_for_each_update(model_path, monkeypatch):
    """By the run's seed and the update's number alone, so that a resumed run draws the same."""
    model = adapted(model_path)
    for layer in model.layers:
        layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.5))
    model.train()

    def losses(seed, *numbers):
        config = TrainConfig(model="m", data="d", seed=seed)
        step = Step(model, make_optimizer(config, model), config, False)
        return [step([SAMPLES[:2], SAMPLES[2:]], 0.0, number)[0] for number in numbers]

    first, second, again = losses(0, 0, 2, 0)
    assert first == again
    assert len({first, second, *losses(1, 0)}) == 3
    monkeypatch.setattr(step_of_training, "rank", lambda: 1)  # another process of mlx.launch
    assert len({first, second, *losses(0, 0, 1, 2)}) == 5


def test_b_and_the_optimizers_state_stay_float32(tmp_path):
    config = TrainConfig(model="m", data="d", iters=2, batch_size=2, learning_rate=0.02)
    model = adapted(save_model(tmp_path, dtype="bfloat16"))
    optimizer = make_optimizer(config, model)
    Training(model, optimizer, Split(SAMPLES), Split(), config).fit()
    kept = dict(tree_flatten(optimizer.state)) | dict(tree_flatten(model.trainable_parameters()))
    assert {a.dtype for name, a in kept.items() if name.split(".")[-1] in "mv lora_b"} == {
        mx.float32
    }
