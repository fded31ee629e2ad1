"""How good a subspace is."""

import numpy as np


def quality(weight, covariance, a):
    """Captured share of the best energy, and distance from orthonormal rows, in doubles."""
    weight, covariance, a = (np.array(x).astype(np.double) for x in (weight, covariance, a))
    best = np.linalg.svd(weight @ covariance, compute_uv=False)[: len(a)]
    captured = np.square(weight @ covariance @ a.T).sum() / np.square(best).sum()
    return captured, np.abs(a @ a.T - np.eye(len(a))).max()
