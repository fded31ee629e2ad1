import mlx.core as mx
import numpy as np
import pytest
from helpers.subspaces import SPECTRA, problem, quality

from tlora_mlx.method import subspace
from tlora_mlx.method.subspace import task_subspace


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(30, 20), (160, 160), (500, 170), (170, 500)])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_against_lapack_in_double_precision(shape, spectrum, rank):
    weight, covariance = problem(*shape, spectrum)
    a = task_subspace(weight, covariance, rank)
    assert a.shape == (rank, shape[1])
    captured, distance = quality(weight, covariance, a)
    assert captured > 0.9999
    assert distance < 1e-5


def test_large_ones_take_krylov_alone_and_small_ones_the_exact_way(monkeypatch):
    calls = []
    exact = subspace._exact_subspace
    monkeypatch.setattr(subspace, "_exact_subspace", lambda *a: calls.append(a) or exact(*a))
    for spectrum in SPECTRA:
        task_subspace(*problem(500, 170, spectrum), 4)
    assert calls == []
    task_subspace(*problem(30, 20, "slow"), 4)
    assert len(calls) == 1
    # Where the energy has not converged within the bound, the exact way takes over.
    monkeypatch.setattr(subspace, "PRODUCTS", 2)
    weight, covariance = problem(500, 170, "flat")
    captured, _ = quality(weight, covariance, task_subspace(weight, covariance, 4))
    assert len(calls) == 2
    assert captured > 0.9999


def test_the_same_seed_gives_the_same_bits():
    weight, covariance = problem(500, 170, "slow")
    first, again, other = (task_subspace(weight, covariance, 4, seed) for seed in (1, 1, 2))
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, other)
    task_subspace(weight, covariance, 4, seed=2**70)  # of any size


@pytest.mark.parametrize("shape", [(16, 12), (300, 200)])
def test_scales_and_zero(shape):
    weight, covariance = problem(*shape, "power")
    for scale in (1e-15, 1e30):
        a = task_subspace(weight, scale * covariance, 3)
        assert quality(weight, covariance, a)[0] > 0.9999
    # C is in float32's range, W·C is not.
    a = task_subspace(1e4 * weight, covariance / mx.abs(covariance).max() * 1e37, 3)
    assert quality(weight, covariance, a)[0] > 0.9999
    a = task_subspace(weight, mx.zeros_like(covariance), 3)
    assert mx.abs(a @ a.T - mx.eye(3)).max().item() < 1e-5


@pytest.mark.parametrize("rank", [0, 13])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not between 1 and"):
        task_subspace(mx.zeros((16, 12)), mx.eye(12), rank)


@pytest.mark.parametrize("shape", [(4, 4), (300, 200)])
def test_not_finite(shape):
    weight, covariance = problem(*shape, "power")
    with pytest.raises(ValueError, match="not finite"):
        task_subspace(weight, covariance * mx.nan, 1)
    with pytest.raises(ValueError, match="not finite"):
        task_subspace(weight * mx.inf, covariance, 1)


def driven(steps):
    """The result of a Krylov generator whose C is the identity: A in doubles, and whether it is."""
    block = next(steps)
    while True:
        try:
            block = steps.send(block)
        except StopIteration as end:
            a, converged = end.value
            return np.array(a, np.float64), converged


@pytest.mark.parametrize("ratio", [1e2, 1183.0, 1e4])
@pytest.mark.parametrize("products", ["exact", "streaming"])
def test_what_is_behind_a_huge_direction(ratio, products):
    """Of W·C whose first singular value is nearly all of it, with a slow tail: directions 2 to 16.

    As in real models, whose activations have a few massive directions.
    """
    random = np.random.default_rng(3)
    size, rank = 640, 16
    left, _ = np.linalg.qr(random.standard_normal((size, size)))
    right, _ = np.linalg.qr(random.standard_normal((size, size)))
    values = np.concatenate([[ratio], np.arange(1, size) ** -0.3])
    weight = mx.array((left * values) @ right.T, mx.float32)
    tolerance, most, oversampling = (
        (subspace.TOLERANCE, subspace.PRODUCTS, subspace.OVERSAMPLING)
        if products == "exact"
        else (5e-5, 12, 32)
    )
    steps = subspace.krylov_subspace(
        lambda: weight, (size, size), rank, oversampling, most, tolerance, seed=0
    )
    a, converged = driven(steps)
    assert converged
    exact = np.array(weight, np.float64)
    _, s, vt = np.linalg.svd(exact)
    beyond = vt[1:rank] @ a.T  # of directions 2 to 16, what A's rows span
    captured = np.square(s[1:rank, None] * beyond).sum() / np.square(s[1:rank]).sum()
    assert captured > 1 - 5e-6
    assert np.abs(a @ a.T - np.eye(rank)).max() < 1e-5
