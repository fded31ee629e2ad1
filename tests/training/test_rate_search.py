"""``check --find-rate`` and ``--learning-rate auto``."""

import json
import math
import os
import signal
from contextlib import contextmanager

import mlx.core as mx
import pytest
from helpers.commands import assert_one_sentence, quick_train, val_losses
from helpers.models import ROWS, write_jsonl

from tlora_mlx import Observer, RunError, TrainConfig, train
from tlora_mlx.data.samples import Split
from tlora_mlx.errors import Interrupted
from tlora_mlx.method.layers import adapter_tensors, attach
from tlora_mlx.runs.rates import Trial
from tlora_mlx.training.rate_search import FIRST_RATE, _climb, search_rate
from tlora_mlx.training.setup import prepare
from tlora_mlx.training.start import find_start


@pytest.mark.parametrize("best", [2.0**n * FIRST_RATE for n in (-6, -1, 0, 1, 7)])
def test_the_best_rate_is_found_wherever_it_is(best):
    def loss(rate):
        return abs(math.log2(rate / best))

    tried = {t.rate: t.loss for t in _climb(lambda rate: Trial(rate, loss(rate)))}
    assert min(tried, key=tried.get) == pytest.approx(best)
    assert {best / 2, best * 2} <= tried.keys()  # powers of two, so exactly
    assert len(tried) <= abs(math.log2(best / FIRST_RATE)) + 3


def test_rates_that_do_not_stay_finite_lead_downwards():
    def trial(rate):
        return Trial(rate, None if rate > 3e-5 else abs(math.log2(rate / 1e-5)))

    tried = [t for t in _climb(trial) if t.loss is not None]
    assert min(tried, key=lambda t: t.loss).rate == pytest.approx(1e-5, rel=0.5)


def test_the_search_ends_where_no_rate_helps():
    assert len(_climb(lambda rate: Trial(rate, None))) < 15
    assert len(_climb(lambda rate: Trial(rate, 1.0))) == 3


@pytest.fixture(scope="module")
def started(model_path, data_path):
    config = TrainConfig(
        model=str(model_path), data=str(data_path), rank=4, iters=6, batch_size=4, warmup=0.5
    )
    setup = prepare(config)
    start = find_start(config, setup)
    attach(setup.base.model, start.plan, start.a)
    return config, setup


def test_the_adapter_is_the_same_afterwards(started):
    config, setup = started
    before = adapter_tensors(setup.base.model)
    search = search_rate(setup.base.model, setup.data, config)
    after = adapter_tensors(setup.base.model)
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert search.updates == 6
    assert min(t.loss for t in search.trials) < search.before
    again = search_rate(setup.base.model, setup.data, config)
    assert again == search


def test_without_validation_data_training_samples_are_set_aside(started):
    config, setup = started
    data = setup.data | {"valid": Split()}
    search = search_rate(setup.base.model, data, config)
    assert search.before != search_rate(setup.base.model, setup.data, config).before


def test_an_interruption(started):
    class Stops(Observer):
        @contextmanager
        def stage(self, name, total, done=0):
            def advance(steps=1, text=None):
                if name.startswith("trying"):
                    os.kill(os.getpid(), signal.SIGINT)

            yield advance

    config, setup = started
    before = adapter_tensors(setup.base.model)
    with pytest.raises(Interrupted, match="nothing was trained") as stop:
        search_rate(setup.base.model, setup.data, config, Stops())
    assert stop.value.exit_code == 130
    after = adapter_tensors(setup.base.model)
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_no_rate_helps(started, monkeypatch):
    config, setup = started
    monkeypatch.setattr("tlora_mlx.training.rate_search.evaluate", lambda *_, **__: 1.0)
    with pytest.raises(RunError, match=r"no learning rate from 0\.0005 to 0\.002 lowers the"):
        search_rate(setup.base.model, setup.data, config)


def test_auto_is_the_run_at_the_rate_that_was_found(model_path, data_path, tmp_path, tlora_here):
    options = {"iters": 6, "rank": 4, "batch_size": 4, "save_every": 3}
    found = quick_train(model_path, data_path, tmp_path / "found", learning_rate="auto", **options)
    search = json.loads((found / "learning_rates.json").read_text())
    rate = json.loads((found / "adapter_config.json").read_text())["learning_rate"]
    assert rate == search["recommended"]
    assert {t["rate"] for t in search["trials"]} >= {rate}
    given = quick_train(model_path, data_path, tmp_path / "given", learning_rate=rate, **options)
    adapters = [(run / "adapters.safetensors").read_bytes() for run in (found, given)]
    assert adapters[0] == adapters[1]
    assert val_losses(found) == val_losses(given)
    assert not (given / "learning_rates.json").exists()
    # resumed with the same words
    again = {**options, "resume": True, "learning_rate": "auto"}
    config = TrainConfig(
        model=str(model_path), data=str(data_path), adapter_path=str(found), **again
    )
    assert train(config).was_finished
    assert tlora_here("report", found).returncode == 0
    assert f"taken: {rate:.2g}" in (found / "report.html").read_text()


def test_from_the_command_line(model_path, tmp_path, tlora_here):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    arguments = ["--model", model_path, "--data", tmp_path, "--rank", 4, "--iters", 3]
    result = tlora_here("check", *arguments, "--rows", 0, "--find-rate")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("<- recommended") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl"]
    bad = tlora_here("train", *arguments, "--learning-rate", "fast")
    assert_one_sentence(bad, 2, "--learning-rate must be a number or auto, not 'fast'")
