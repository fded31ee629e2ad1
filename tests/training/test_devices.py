"""A GPU gives the plan and the losses that the CPU beside it gives: a Mac's, or NVIDIA's."""

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import quick_train
from helpers.metal import on_the_cpu
from helpers.models import save_model
from helpers.paths import EXAMPLE

from tlora_mlx import read_run


def same_run(model, data, path, **options):
    """The plan and the losses of a run on the GPU and of the same run on the CPU."""
    gpu = quick_train(model, data, path / "gpu", **options)
    with on_the_cpu():
        cpu = quick_train(model, data, path / "cpu", **options)
    ours, theirs = (read_run(run).plan.modules for run in (gpu, cpu))
    assert {n: m.rank for n, m in ours.items()} == {n: m.rank for n, m in theirs.items()}
    for name, module in ours.items():
        assert module.sensitivity == pytest.approx(theirs[name].sensitivity, rel=1e-3), name
    losses = []
    for run in (gpu, cpu):
        reports = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([r[k] for r in reports for k in ("train_loss", "val_loss") if r.get(k)])
    assert len(losses[0]) > 2
    np.testing.assert_allclose(*losses, rtol=1e-2)


needs_a_gpu = pytest.mark.skipif(
    mx.default_device() != mx.gpu, reason="there is no GPU to compare the CPU with"
)


@needs_a_gpu
def test_the_example(tmp_path):
    options = {"iters": 12, "rank": 8, "learning_rate": 3e-3, "calibration_samples": 16}
    same_run(EXAMPLE / "model", EXAMPLE / "data", tmp_path, val_batches=4, **options)


@needs_a_gpu
@pytest.mark.parametrize("family", ["qwen3_next", "granitemoehybrid"])
def test_models_with_kernels(family, data_path, tmp_path):
    model = save_model(tmp_path / "model", family)
    same_run(model, data_path, tmp_path, iters=4, calibration_samples=4)
