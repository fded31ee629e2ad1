"""The form in which mlx-lm loads a run: one rank, scales in B, experts stacked by their numbers."""

import mlx.core as mx
import numpy as np

from tlora_mlx.method.allocation import ModulePlan, RankPlan
from tlora_mlx.runs.padded import padded


def test_half_precision_is_multiplied_in_float32():
    """In bfloat16, 1.01 times B would differ by up to 0.4 %."""
    plan = RankPlan(2, 2, {"q": ModulePlan(2, 1.01, 1.0, 3, 5)})
    a, b = mx.random.normal((5, 2)), mx.random.normal((2, 3)).astype(mx.bfloat16)
    found = padded(plan, {"q.lora_a": a, "q.lora_b": b})
    assert found["q.lora_b"].dtype == mx.float32
    expected = np.float32(1.01) * np.array(b.astype(mx.float32))
    np.testing.assert_array_equal(np.array(found["q.lora_b"]), expected)
    assert mx.array_equal(found["q.lora_a"], a)


def test_experts_are_stacked_by_number_whatever_their_order():
    numbers, ranks = [2, 0, 10, 1], [1, 2, 0, 3]
    modules, tensors = {}, {}
    for number, rank in zip(numbers, ranks, strict=True):
        name = f"experts.up_proj.{number}"
        modules[name] = ModulePlan(rank, 1.0, 1.0, 4, 6)
        if rank:
            tensors[f"{name}.lora_a"] = mx.full((6, rank), number + 1.0)
            tensors[f"{name}.lora_b"] = mx.full((rank, 4), number + 1.0)
    found = padded(RankPlan(2, 2, modules), tensors)
    a, b = found["experts.up_proj.lora_a"], found["experts.up_proj.lora_b"]
    assert (a.shape, b.shape) == ((4, 3, 6), (4, 4, 3))
    # 0 has rank 2, 1 has 3, 2 has 1 and 10 none: rows beyond the rank are zeros.
    assert np.array(a[:, :, 0]).tolist() == [[1, 1, 0], [2, 2, 2], [3, 0, 0], [0, 0, 0]]
    assert np.array(b[:, 0, :]).tolist() == [[1, 1, 0], [2, 2, 2], [3, 0, 0], [0, 0, 0]]
