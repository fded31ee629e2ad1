"""Problems for task subspaces, and how good a subspace is."""

import mlx.core as mx
import numpy as np

SPECTRA = {
    "fast": lambda i: 2.0**-i + 1e-9,
    "power": lambda i: 1 / i,
    "slow": lambda i: i**-0.25,
    "flat": lambda i: np.ones(len(i)),
    "clusters": lambda i: np.where(i <= len(i) // 8, 1.0, 0.3),
    "deficient": lambda i: np.where(i <= 5, 1.0, 0.0),
    "one huge direction": lambda i: np.where(i == 1, 1e5, i**-0.7),
}


def problem(out_features, in_features, spectrum):
    """A random W, and a C with random directions and the spectrum's eigenvalues, float32."""
    random = np.random.default_rng(0)
    directions, _ = np.linalg.qr(random.standard_normal((in_features, in_features)))
    eigenvalues = SPECTRA[spectrum](np.arange(1, in_features + 1))
    covariance = (directions * eigenvalues) @ directions.T
    weight = random.standard_normal((out_features, in_features)) / np.sqrt(in_features)
    return mx.array(weight.astype(np.float32)), mx.array(covariance.astype(np.float32))


def quality(weight, covariance, a):
    """Captured share of the best energy, and distance from orthonormal rows, in doubles."""
    weight, covariance, a = (np.array(x).astype(np.double) for x in (weight, covariance, a))
    best = np.linalg.svd(weight @ covariance, compute_uv=False)[: len(a)]
    captured = np.square(weight @ covariance @ a.T).sum() / np.square(best).sum()
    return captured, np.abs(a @ a.T - np.eye(len(a))).max()
