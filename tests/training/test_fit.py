"""``check --fit``: memory and time, and what is proposed where it does not fit."""

import json

import mlx.core as mx
import pytest
from helpers.commands import quick_train
from helpers.models import ROWS, write_jsonl

from tlora_mlx import TrainConfig
from tlora_mlx.data.samples import Sample
from tlora_mlx.method.layers import ADAPTED_TYPES
from tlora_mlx.training.fit import _with_less, measure_fit
from tlora_mlx.training.peak import Peak, _expected, peak_of
from tlora_mlx.training.rehearsal import Rehearsal, _line
from tlora_mlx.training.setup import prepare

MB = 2**20


@pytest.fixture(scope="module")
def long_data(tmp_path_factory):
    """Samples of many lengths, up to some hundred tokens."""
    path = tmp_path_factory.mktemp("long")
    rows = [{"prompt": "Add.\n", "completion": "return 1 + 2\n" * n} for n in range(1, 49, 3)]
    write_jsonl(path / "train.jsonl", rows)
    write_jsonl(path / "valid.jsonl", ROWS[:3])
    return path


@pytest.fixture(scope="module")
def settings(model_path, long_data):
    config = TrainConfig(model=str(model_path), data=str(long_data), rank=4, iters=20, batch_size=4)
    return config, prepare(config)


@pytest.fixture(scope="module")
def fit(settings):
    return measure_fit(*settings)


def test_a_run_that_fits(fit, settings):
    _, setup = settings
    (attempt,) = fit.attempts
    assert attempt.changes == ""
    assert attempt.calibration.measured
    assert attempt.update.measured
    assert fit.weights < attempt.peak() < fit.available
    lengths = sorted(len(sample.tokens) for sample in setup.data["train"].samples)
    assert fit.longest == (4, lengths[-1])
    duration = fit.duration
    assert duration.updates == 20
    assert min(duration.initialisation, duration.training, duration.validation) > 0
    tokens = 20 / 4 * sum(lengths)  # 16 samples are 4 batches an epoch
    assert duration.tokens_per_second * duration.training == pytest.approx(tokens)
    assert not any(isinstance(m, ADAPTED_TYPES) for m in setup.base.model.modules())


def test_the_peaks_are_the_run_s_own(fit, model_path, long_data, tmp_path):
    options = {"iters": 4, "batch_size": 4, "steps_per_report": 4}
    run = quick_train(model_path, long_data, tmp_path / "run", **options)
    reports = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    measured = max(r["peak_memory"] for r in reports if "peak_memory" in r) * 1e9
    (attempt,) = fit.attempts
    # Counted from the model up, since other tests leave arrays behind.
    assert measured > fit.weights
    assert attempt.update.bytes - fit.weights > 0.8 * (measured - fit.weights)


def test_less_and_less_until_it_fits(fit, settings):
    config, setup = settings
    calls = {type(block): type(block).__call__ for block in setup.base.model.layers}
    (whole,) = fit.attempts
    available = fit.weights + (whole.peak() - fit.weights) // 2
    less = measure_fit(config, setup, available)
    assert [a.changes for a in less.attempts][:2] == ["", "--grad-checkpoint"]
    assert all(attempt.peak() > available for attempt in less.attempts[:-1])
    assert less.attempts[-1].peak() <= available
    assert less.attempts[-1].changes.startswith("--grad-checkpoint --batch-size")
    assert less.duration
    assert {block: block.__call__ for block in calls} == calls
    assert "does not fit" in "\n".join(less.summary())
    assert less.summary()[-1].startswith("time: about ")


def test_the_start_of_an_earlier_attempt_is_counted(settings, monkeypatch):
    """If only the update does not fit, the next attempt has the same start, and needs its time."""
    measured = Rehearsal.update

    def update(self, start):
        peak = measured(self, start)
        return peak if self._config.grad_checkpoint else Peak(2**60, False)

    monkeypatch.setattr(Rehearsal, "update", update)
    fit = measure_fit(*settings)
    assert [attempt.changes for attempt in fit.attempts] == ["", "--grad-checkpoint"]
    assert fit.attempts[0].calibration == fit.attempts[1].calibration
    assert fit.duration.initialisation > 0


def test_samples_cut_so_short_that_nothing_is_left_to_learn(model_path, tmp_path):
    rows = [{"prompt": "Add 1 and 2. " * 70, "completion": "return 3\n"}] * 2
    write_jsonl(tmp_path / "train.jsonl", rows)
    config = TrainConfig(model=str(model_path), data=str(tmp_path), rank=4, batch_size=2)
    setup = prepare(config)
    fit = measure_fit(config, setup, mx.get_active_memory() + 1000)
    assert fit.duration is None
    assert fit.longest == (2, setup.data["train"].longest())
    assert not any("--max-seq-length" in attempt.changes for attempt in fit.attempts)


def test_nothing_fits(settings, fit):
    config, setup = settings
    none = measure_fit(config, setup, fit.weights + 1000)
    assert none.duration is None
    assert not any(a.calibration.measured and a.peak() <= none.available for a in none.attempts)
    assert none.summary()[-1].startswith("nothing that was tried fits")
    assert not any(isinstance(m, ADAPTED_TYPES) for m in setup.base.model.modules())


def test_what_is_tried_in_which_order(settings):
    config, _ = settings
    flags = [changes for _, changes in _with_less(config, 1200)]
    assert flags == [
        "",
        "--grad-checkpoint",
        "--grad-checkpoint --batch-size 2 --grad-accumulation-steps 2",
        "--grad-checkpoint --batch-size 1 --grad-accumulation-steps 4",
        f"{flags[3]} --covariance streaming",
        f"{flags[4]} --max-seq-length 600",
        f"{flags[4]} --max-seq-length 300",
    ]
    last, _ = list(_with_less(config, 1200))[-1]
    assert (last.batch_size, last.grad_accumulation_steps, last.max_seq_length) == (1, 4, 300)
    assert (last.grad_checkpoint, last.covariance) == (True, "streaming")


@pytest.mark.parametrize(("available", "runs"), [(100, True), (20, False)])
def test_what_would_not_fit_is_not_run(available, runs):
    rows, length, sizes = 4, 512, []

    def work(samples):
        sizes.append((len(samples), len(samples[0].tokens)))
        mx.eval(mx.zeros((len(samples) * len(samples[0].tokens), MB // 4 // 64)))

    before = mx.get_active_memory()
    samples = [Sample([0] * length, 1)] * rows
    peak = peak_of(work, samples, before + available * MB)  # 16 KB a token: 32 MB in all
    assert sizes[0] == (1, 64)
    assert ((4, 512) in sizes) == runs == peak.measured
    if runs:
        assert (peak.bytes - before) / MB == pytest.approx(32, rel=0.1)
    else:
        assert peak.bytes > before + available * MB


def test_peaks_are_extrapolated():
    assert _expected([(1, 64, 100)], 1, 128) == 0  # one measurement tells nothing
    assert _expected([(1, 64, 100), (1, 128, 164)], 1, 256) == 164 + 2 * 128
    assert _expected([(1, 128, 164), (1, 256, 292)], 2, 256) == 292 + 256
    assert _expected([(1, 128, 164), (1, 256, 160)], 2, 256) == 160


def test_a_batch_s_time():
    assert _line((10, 1.0), (30, 2.0))(50) == pytest.approx(3.0)
    assert _line((10, 1.0), (30, 0.5))(30) == pytest.approx(3.0)
    assert _line((10, 1.0), (10, 1.2))(20) == pytest.approx(2.0)


def test_from_the_command_line(model_path, data_path, tlora_here):
    arguments = ["--model", model_path, "--data", data_path, "--rows", 0, "--iters", 3]
    result = tlora_here("check", *arguments, "--rank", 4, "--fit")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("memory: this machine offers ") for line in lines)
    assert any(line.startswith("  as given: calibration ") and "fits" in line for line in lines)
    assert lines[-1].startswith("time: about ")
