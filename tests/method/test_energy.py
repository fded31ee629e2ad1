import mlx.core as mx
import numpy as np
import pytest
from helpers.subspaces import SPECTRA, problem

from tlora_mlx.method.energy import captured_energy
from tlora_mlx.method.subspace import task_subspace


def shares(weight, covariance, a, leading):
    """What A captures of W·C's energy, in all and beyond its first directions, in doubles."""
    product = np.array(weight, np.float64) @ np.array(covariance, np.float64)
    _, values, vt = np.linalg.svd(product)
    rest = (product @ vt[leading:].T) @ vt[leading:]
    inside = [np.square(p @ np.array(a, np.float64).T).sum() for p in (product, rest)]
    return inside[0] / np.square(values).sum(), inside[1] / np.square(values[leading:]).sum()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_captured_energy(spectrum):
    weight, covariance = problem(60, 40, spectrum)
    a = task_subspace(weight, covariance, 4)
    found = [captured_energy(weight, 1e20 * covariance, a, seed) for seed in range(30)]
    leading = 1 if spectrum == "one huge direction" else 0
    assert {energy.leading for energy in found} == {leading}
    for i, share in enumerate(shares(weight, covariance, a, leading)):
        estimates = [energy[i] for energy in found]
        assert np.allclose(estimates, share, atol=0.05)
        assert abs(np.mean(estimates) - share) < 0.01
    assert captured_energy(weight, mx.zeros_like(covariance), a) == (0.0, 0.0, 0)


@pytest.mark.parametrize("ratio", [1e2, 1183.0, 1e4])
@pytest.mark.parametrize("leading", [1, 2])
def test_beyond_huge_directions(ratio, leading):
    """In all, a good A and one that misses half of the rest look the same; behind them, not."""
    random = np.random.default_rng(3)
    size, rank = 200, 8
    left, _ = np.linalg.qr(random.standard_normal((size, size)))
    right, _ = np.linalg.qr(random.standard_normal((size, size)))
    values = np.concatenate([np.full(leading, ratio), np.arange(1, size + 1 - leading) ** -1.0])
    weight, covariance = mx.array((left * values) @ right.T, mx.float32), mx.eye(size)
    half = (rank - leading) // 2
    wrong = np.r_[right.T[: rank - half], right.T[-half:]]
    for rows in (right.T[:rank], wrong):
        a = mx.array(rows, mx.float32)
        total, beyond, count = captured_energy(weight, covariance, a)
        assert count == leading
        assert total > 1 - 2 / ratio**2
        assert abs(beyond - shares(weight, covariance, a, leading)[1]) < 0.02


def test_what_is_only_rounding_is_no_gap():
    """Behind the five directions of a deficient W·C there is nothing to lead."""
    weight, covariance = problem(60, 40, "deficient")
    energy = captured_energy(weight, covariance, task_subspace(weight, covariance, 8))
    assert energy.leading == 0
    assert energy.beyond == energy.total > 0.9999
