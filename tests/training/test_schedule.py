import pytest

from tlora_mlx.training.schedule import learning_rate


def rates(schedule, updates=100, warmup=0.1):
    return [learning_rate(i, updates, 2.0, schedule, warmup) for i in range(updates)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_peak_and_no_update_is_lost(schedule):
    values = rates(schedule)
    assert values[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert max(values) == values[9] == values[10] == 2.0
    assert min(values) > 0


def test_after_the_warm_up():
    assert rates("constant")[10:] == [2.0] * 90
    assert rates("linear")[55] == pytest.approx(1.0)
    assert rates("cosine")[55] == pytest.approx(1.0)
    assert rates("cosine")[40] == pytest.approx(1.5)
    assert rates("cosine", warmup=0.0)[0] == 2.0
    assert rates("linear", updates=1, warmup=1.0) == [2.0]
    # A part of an update is a whole one.
    assert rates("constant", updates=9, warmup=0.23)[:4] == pytest.approx([2 / 3, 4 / 3, 2, 2])
