import mlx.core as mx
import numpy as np
import pytest

from tlora_mlx.method.subspace import task_subspace


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24), (1, 9), (9, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e15])
def test_against_lapack_in_double_precision(shape, scale):
    random = np.random.default_rng(3)
    weight = random.standard_normal(shape)
    inputs = random.standard_normal((200, shape[1])) * np.linspace(1, 3, shape[1])
    covariance = inputs.T @ inputs * scale
    rank = max(1, min(shape) // 3)
    a = np.array(
        task_subspace(
            mx.array(weight.astype(np.float32)), mx.array(covariance.astype(np.float32)), rank
        )
    ).astype(np.float64)
    _, singular_values, _ = np.linalg.svd(weight @ covariance)
    assert a.shape == (rank, shape[1])
    assert np.abs(a @ a.T - np.eye(rank)).max() < 1e-5
    captured = (np.square(weight @ covariance @ a.T)).sum() / np.square(
        singular_values[:rank]
    ).sum()
    assert captured > 0.9999


def test_rank_deficient_and_zero_covariance_still_give_orthonormal_rows():
    random = np.random.default_rng(0)
    weight = mx.array(random.standard_normal((16, 12)).astype(np.float32))
    direction = mx.array(random.standard_normal((12, 2)).astype(np.float32))
    for covariance in (direction @ direction.T, mx.zeros((12, 12))):
        a = task_subspace(weight, covariance, 5)
        assert mx.abs(a @ a.T - mx.eye(5)).max().item() < 1e-5


@pytest.mark.parametrize("rank", [0, 13])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not between 1 and"):
        task_subspace(mx.zeros((16, 12)), mx.eye(12), rank)


def test_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        task_subspace(mx.ones((4, 4)), mx.full((4, 4), mx.nan), 2)
