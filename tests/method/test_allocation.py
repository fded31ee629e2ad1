import json
import math

import numpy as np
import pytest

from tlora_mlx.method.allocation import RankPlan, plan_ranks


def plan(sensitivities, rank, alpha=1, shape=(10**6, 10**6), **options):
    names = [f"m{i}" for i in range(len(sensitivities))]
    shapes = [shape] * len(names) if isinstance(shape, tuple) else shape
    return plan_ranks(
        dict(zip(names, sensitivities, strict=True)),
        dict(zip(names, shapes, strict=True)),
        rank,
        alpha,
        **options,
    )


def ranks(*arguments, **options):
    return [module.rank for module in plan(*arguments, **options).modules.values()]


@pytest.mark.parametrize(
    ("sensitivities", "rank", "expected"),
    [
        ([1, 1, 1, 1], 4, [4, 4, 4, 4]),
        ([3, 1], 4, [6, 2]),
        ([1, 0], 3, [6, 0]),
        # 0.5 and 1.5 round to even: 0 + 2 + 0 = 2 of 3; the missing one goes to the largest.
        ([0.5, 1.5, 1.0], 1, [0, 2, 1]),
        # 2.5, 2.5, 1.0: rounds to 2, 2, 1; the missing one goes to the first of the largest.
        ([2.5, 2.5, 1.0], 2, [3, 2, 1]),
        # 3.5, 1.5, 1.0: rounds to 4, 2, 1; the one too many comes from the largest.
        ([3.5, 1.5, 1.0], 2, [3, 2, 1]),
        # Rounds to 4, 4, 2, 1, 1: one unit at a time, so each of the two largest gives one.
        ([3.6, 3.6, 1.6, 0.6, 0.6], 2, [3, 3, 2, 1, 1]),
    ],
)
def test_the_authors_rounding(sensitivities, rank, expected):
    assert ranks(sensitivities, rank) == expected


def test_scale_is_over_the_base_rank_and_never_below_the_base_scale():
    result = plan([8, 1, 1], rank=4, alpha=6)
    # shares 0.8, 0.1, 0.1 of alpha's budget 18: 14, 2, 2, raised to 6.
    assert [m.scale for m in result.modules.values()] == [14 / 4, 6 / 4, 6 / 4]


def test_ranks_above_a_cap_go_to_the_others_in_proportion():
    # Uncapped: 18, 4, 2. The first is capped at 10; its 8 go 2 : 1.
    assert ranks([18, 4, 2], 8) == [18, 4, 2]
    assert ranks([18, 4, 2], 8, shape=[(10, 50), (50, 50), (50, 50)]) == [10, 9, 5]
    assert ranks([18, 4, 2], 8, max_rank=10) == [10, 9, 5]


def test_a_budget_above_all_caps_fills_every_module():
    assert ranks([5, 1, 1], 100, shape=[(8, 4), (3, 9), (7, 7)]) == [4, 3, 7]


def test_excess_reaches_modules_without_sensitivity_last():
    assert ranks([1, 0, 0], 4, max_rank=6) == [6, 3, 3]


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_stays_whole(seed):
    random = np.random.default_rng(seed)
    count, rank = random.integers(1, 40), int(random.integers(1, 20))
    shapes = [tuple(map(int, random.integers(1, 60, 2))) for _ in range(count)]
    sensitivities = (random.random(count) ** 4).tolist()
    result = ranks(sensitivities, rank, shape=shapes)
    caps = [min(shape) for shape in shapes]
    assert all(0 <= r <= cap for r, cap in zip(result, caps, strict=True))
    assert sum(result) == min(rank * count, sum(caps))
    unbound = ranks(sensitivities, rank)
    if all(r <= cap for r, cap in zip(unbound, caps, strict=True)):
        assert result == unbound


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_sensitivities_are_named(bad):
    with pytest.raises(ValueError, match=r"not finite.*m1"):
        plan([1.0, bad], 4)


def test_all_zero():
    with pytest.raises(ValueError, match="all sensitivities are 0"):
        plan([0.0, 0.0], 4)


def test_a_plan_survives_json():
    result = plan([3.0, 1.0, 0.01], 4, alpha=6, shape=(64, 48))
    assert RankPlan.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert result.trained_parameters() == sum(m.rank for m in result.modules.values()) * 64
    assert list(result.adapted()) == ["m0", "m1"]


def test_all_faults_of_a_plan_in_one_message():
    data = plan([3.0, 1.0], 4).to_dict()
    data["alpha"] = 0
    data["modules"]["m0"]["rank"] = -1
    data["modules"]["m1"] |= {"scale": math.nan, "sensitivity": -1.0, "in_features": 10**400}
    data["modules"]["m2"] = data["modules"]["m0"] | {"rank": 2**31}  # too large for MLX's shapes
    faults = r"'alpha'.*'rank' of m0.*'in_features' of m1.*'scale' of m1.*'sensitivity' of m1.*m2"
    with pytest.raises(ValueError, match=faults):
        RankPlan.from_dict(data)
