"""The task subspace: top right singular vectors of W·C (TLoRA, section "Initialise").

W·C is never formed, and C need not be: a block Krylov method needs only products of C with a few
vectors at a time. ``krylov_subspace`` is a generator that yields such a block P and is sent C·P, so
its caller can either multiply by a covariance it has (``task_subspace``) or accumulate the products
of all modules in one pass over the samples (``initialise.streamed_subspaces``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import mlx.core as mx
import numpy as np

from tlora_mlx.method import linalg
from tlora_mlx.method.symmetric import unit_of

# Vectors beyond the rank in each Krylov block: clusters of singular values converge faster.
OVERSAMPLING = 8
# The captured energy, and that beyond any number of leading directions, has converged when another
# product raises it by less than this share.
TOLERANCE = 1e-6
# Singular values are known to this share of the largest, in float32.
NOISE = 4e-7
# Maximal number of products with C; if the energy has not converged by then, the exact way is used.
PRODUCTS = 32
# Most spectra need a basis of this many blocks; Krylov pays only if that is below min(out, in).
TYPICAL_BLOCKS = 8


def task_subspace(weight: mx.array, covariance: mx.array, rank: int, seed: int = 0) -> mx.array:
    """A's initial value: the ``rank`` top right singular vectors of ``weight @ covariance``.

    Only the subspace is defined: signs, and the order within a cluster of equal singular values,
    are arbitrary. Small matrices use the exact way, a singular value decomposition; large ones use
    block Krylov iterations until the captured energy has converged.

    Args:
        weight: W (out, in), any float dtype.
        covariance: C (in, in), float32. Its scale does not affect the result.
        rank: between 1 and min(out, in).
        seed: of the Krylov method's first block.

    Returns:
        (rank, in) float32 with orthonormal rows, evaluated.

    Raises:
        ValueError: ``rank`` is outside 1..min(out, in), or W·C is not finite.

    Source: paper, section 3.2; Rambo-Yi/TLora e3463ae, ``peft/tuners/lora/layer.py::tlora_init``;
    block Krylov: Musco and Musco, NeurIPS 2015.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} is not between 1 and min{tuple(weight.shape)}")
    unit = unit_of(covariance)
    if not mx.isfinite(unit).item():
        raise ValueError("the covariance has entries that are not finite")
    return _top_right_vectors(weight.astype(mx.float32), covariance, rank, seed, unit)


def top_right_vectors(matrix: mx.array, rank: int, seed: int = 0) -> mx.array:
    """The ``rank`` top right singular vectors of a matrix, found as in ``task_subspace``.

    Args:
        matrix: (m, n), any float dtype.
        rank: between 1 and min(m, n).
        seed: of the Krylov method's first block.

    Returns:
        (rank, n) float32 with orthonormal rows, evaluated.

    Raises:
        ValueError: the matrix is not finite.
    """
    return _top_right_vectors(matrix.astype(mx.float32), None, rank, seed)


def _top_right_vectors(
    weight: mx.array, covariance: mx.array | None, rank: int, seed: int, unit: mx.array | float = 1
) -> mx.array:
    """The top right singular vectors of W·C / unit, all float32, or of W if C is None."""
    if min(weight.shape) > TYPICAL_BLOCKS * (rank + OVERSAMPLING):
        steps = krylov_subspace(
            lambda: weight, weight.shape, rank, OVERSAMPLING, PRODUCTS, TOLERANCE, seed
        )
        block = next(steps)
        while True:
            try:
                block = steps.send(block if covariance is None else covariance @ (block / unit))
            except StopIteration as done:
                a, converged = done.value
                break
        if converged:
            return a
    return _exact_subspace(weight if covariance is None else (weight / unit) @ covariance, rank)


def _exact_subspace(product: mx.array, rank: int) -> mx.array:
    """The ``rank`` top right singular vectors of W·C (out, in), by a full decomposition."""
    if not mx.isfinite(product).all().item():
        raise ValueError("W·C has entries that are not finite")
    _, _, vt = linalg.svd(product)
    return mx.contiguous(vt[:rank])


def krylov_subspace(
    weight: Callable[[], mx.array],
    shape: tuple[int, int],
    rank: int,
    oversampling: int,
    products: int,
    tolerance: float,
    seed: int,
) -> Generator[mx.array, mx.array, tuple[mx.array, bool]]:
    """Block Golub-Kahan iterations on M = W·C, with full reorthogonalisation.

    The first product with C turns a random block into a sketch of M's row space, the first block of
    the basis V. Then each pair of products applies M to V's newest block, which gives U's next
    block, and Mᵀ to that one, which gives V's next. Uᵀ M V is small; its singular vectors give the
    best answer in the span of V, after each half of a pair.

    Args:
        weight: returns W (out, in) float32; called at each use, so that W need not be kept.
        shape: (out, in).
        rank: number of vectors, between 1 and min(out, in).
        oversampling: vectors beyond the rank in each block.
        products: maximal number of products with C, at least 2.
        tolerance: the captured energy has converged when a product raises neither it nor what is
            captured beyond any number of leading directions by more than this share.
        seed: of the random block.

    Yields:
        P (in, k) float32, evaluated; the caller sends C·P (in, k), scaled by any constant that is
        the same each time.

    Returns:
        (rank, in) float32 with orthonormal rows, and whether the captured energy has converged.

    Raises:
        ValueError: an answer, or its product with W, is not finite.

    Source: Golub, Luk and Overton, "A Block Lanczos Method for Computing the Singular Values and
    Corresponding Singular Vectors of a Matrix", 1981; Musco and Musco, NeurIPS 2015.
    """
    out_features, most = shape[0], min(shape)
    width = min(rank + oversampling, most)
    random = mx.random.normal((out_features, width), key=mx.random.key(seed % 2**64))
    newest, _ = linalg.qr(_finite((yield _finite(weight().T @ random))))
    basis, left = newest, mx.zeros((out_features, 0))
    small = mx.zeros((0, width))  # Uᵀ M V
    energies, used = np.zeros(rank), 1
    while True:
        image = _finite(weight() @ (yield newest))
        used += 1
        u, inside, rest = _extend(left, image, out_features)
        left = mx.concatenate([left, u], axis=1)
        known = small[:, : basis.shape[1] - newest.shape[1]]
        known = mx.pad(known, [(0, u.shape[1]), (0, 0)])
        small = mx.concatenate([known, mx.concatenate([inside, rest])], axis=1)
        for half in ("M", "M transposed"):
            if half == "M transposed":
                newest, _, rest = _extend(basis, _finite((yield _finite(weight().T @ u))), most)
                used += 1
                basis = mx.concatenate([basis, newest], axis=1)
                column = mx.pad(rest.T, [(left.shape[1] - rest.shape[1], 0), (0, 0)])
                small = mx.concatenate([small, column], axis=1)
            _, s, vt = linalg.svd(small)
            before, energies = energies, _tail_energies(s, rank)
            exhausted = newest.shape[1] == 0 or u.shape[1] == 0
            noise = rank * (NOISE * s[0].item()) ** 2
            rise = energies - before <= np.maximum(tolerance * energies, noise)
            converged = exhausted or bool(rise.all())
            if converged or used >= products:
                a, _ = linalg.qr(basis @ vt[:rank].T)
                return mx.contiguous(a.T), converged


def _tail_energies(singular_values: mx.array, rank: int) -> np.ndarray:
    """Σ_{i≥j} σ_i² over the first ``rank`` singular values, for j = 1 … rank, float64.

    The first is the captured energy; in real models one direction is nearly all of it, so the
    others show whether the directions behind it have been found.
    """
    squares = np.zeros(rank)
    squares[: singular_values.size] = np.square(singular_values[:rank].tolist())
    return np.cumsum(squares[::-1])[::-1]


def _extend(basis: mx.array, block: mx.array, most: int) -> tuple[mx.array, mx.array, mx.array]:
    """Orthonormal columns for the part of ``block`` (n, k) outside the span of ``basis`` (n, m).

    Orthogonalised twice: once is inaccurate if the block is almost in the span of the basis.

    Args:
        basis: (n, m) with orthonormal columns.
        block: (n, k).
        most: maximal number of columns of the basis; at most ``most - m`` are added.

    Returns:
        New columns (n, j), and coefficients such that block = basis @ inside + new @ rest.
    """
    inside = basis.T @ block
    first, r = linalg.qr(block - basis @ inside)
    again = basis.T @ first
    new, r_again = linalg.qr(first - basis @ again)
    room = min(new.shape[1], most - basis.shape[1])
    return new[:, :room], inside + again @ r, (r_again @ r)[:room]


def _finite(block: mx.array) -> mx.array:
    if not mx.isfinite(block).all().item():
        raise ValueError("products of W and C are not finite")
    return block
