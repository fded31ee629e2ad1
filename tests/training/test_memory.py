"""The calls that keep a Mac from crashing, and with which values; no Metal is needed for that."""

import mlx.core as mx
import pytest
from helpers.commands import quick_train

from tlora_mlx.training.memory import limit_memory


@pytest.fixture
def calls(monkeypatch):
    """What MLX is told, in order; as on a Mac whose Metal recommends 32 GB."""
    made = []
    recommended = {"max_recommended_working_set_size": 32_000_000_000}
    monkeypatch.setattr(mx, "device_info", lambda: recommended)
    for name in ("set_wired_limit", "set_cache_limit", "clear_cache"):
        monkeypatch.setattr(mx, name, lambda *values, name=name: made.append((name, *values)))
    return made


def test_limits_are_below_what_metal_recommends(calls):
    limit_memory()
    assert calls == [("set_wired_limit", 28_800_000_000), ("set_cache_limit", 2_000_000_000)]


def test_without_metal_nothing_is_limited(calls, monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "x86_64"})
    limit_memory()
    assert calls == []


def test_training_limits_first_and_clears_between_stages(calls, model_path, data_path, tmp_path):
    """After initialisation, after both tests, and after each of three validations."""
    quick_train(model_path, data_path, tmp_path / "run", iters=4, steps_per_eval=2, test=True)
    assert [name for name, *_ in calls[:2]] == ["set_wired_limit", "set_cache_limit"]
    assert calls[2:] == [("clear_cache",)] * (1 + 2 + 3)
