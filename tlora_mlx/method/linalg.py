"""The only caller of ``mx.linalg``: float32, on the CPU stream, evaluated before it returns.

MLX has no factorisations on the GPU, float64 raises there, and a GPU operation that waits for a
slow CPU operation in the same evaluation is killed by the GPU's time-out. So each function here
casts to float32, uses the CPU stream and evaluates its result.
"""

from __future__ import annotations

import mlx.core as mx


def qr(matrix: mx.array) -> tuple[mx.array, mx.array]:
    """Reduced QR factorisation.

    Args:
        matrix: (m, n), any float dtype.

    Returns:
        Q (m, min(m, n)) with orthonormal columns and R (min(m, n), n), float32, evaluated.
    """
    q, r = mx.linalg.qr(matrix.astype(mx.float32), stream=mx.cpu)
    mx.eval(q, r)
    return q, r


def svd(matrix: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Thin singular value decomposition, singular values in descending order.

    ``mx.linalg.svd`` has no thin mode: for (m, n) it builds full (m, m) and (n, n) factors. So a QR
    step first reduces the matrix to a square one of the smaller side with the same singular values.

    Args:
        matrix: (m, n), any float dtype, finite.

    Returns:
        U (m, k), S (k,) and Vᵀ (k, n) with k = min(m, n), float32, evaluated.
    """
    rows, columns = matrix.shape
    if rows < columns:
        u, s, vt = svd(matrix.T)
        return vt.T, s, u.T
    q, r = qr(matrix)
    u, s, vt = mx.linalg.svd(r, stream=mx.cpu)
    mx.eval(u, s, vt)
    u = q @ u
    mx.eval(u)
    return u, s, vt


def cholesky(matrix: mx.array) -> mx.array:
    """The lower triangular L with L Lᵀ = ``matrix``.

    Args:
        matrix: (n, n), any float dtype, symmetric and positive definite.

    Returns:
        L (n, n), float32, evaluated.

    Raises:
        ValueError: the matrix is not positive definite in float32, or not finite.
    """
    try:
        lower = mx.linalg.cholesky(matrix.astype(mx.float32), stream=mx.cpu)
        mx.eval(lower)
    except RuntimeError:
        raise ValueError("a matrix is not positive definite") from None
    if not mx.isfinite(lower).all().item():
        raise ValueError("a matrix is not positive definite")
    return lower
