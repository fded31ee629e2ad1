"""Rounding a matrix to a grid so that the loss notices least: each error is made up for by others.

Rounding every entry of W to the nearest number of the grid changes the layer's outputs by the sum
of many small errors. Here each entry is rounded so as to cancel what the errors made before it do,
where that matters: in the directions of the inputs that occur in the task and of the outputs that
the loss depends on (``method.curvature``).

Sources: Frantar et al., "GPTQ" (ICLR 2023, arXiv 2210.17323), and Chee et al., "QuIP" (NeurIPS
2023, arXiv 2307.13304, section 3: LDLQ, which is the same with one triangular factor), for the
inputs; Tseng et al., "Model-Preserving Adaptive Rounding" (2025, arXiv 2505.22988), for inputs and
outputs together.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tlora_mlx.merging.grid import Grid, Grouped
from tlora_mlx.method.linalg import cholesky

# Rows of a block, which are rounded at once, without making up for each other's errors: so many at
# least, and not much more than so many blocks (at 4,096 rows, blocks of 16 take 0.6 of the time of
# blocks of 4, and the error is 1.015 times as large).
ROWS, BLOCKS = 4, 256
# Columns of a tile; and rows in a panel, whose tiles are worked through along diagonals, all of a
# diagonal at once.
COLUMNS, PANEL = 32, 256


def compensated(
    target: np.ndarray,
    start: Grouped,
    grid: Grid,
    inputs: np.ndarray,
    outputs: np.ndarray,
) -> Grouped:
    """Round to the levels of given scales and biases, minimising tr(O·E·I·Eᵀ) greedily.

    E = Q − W. With I = A·D·Aᵀ and O = N·K·Nᵀ for unit upper triangular A and N, that is the sum of
    D, K-weighted squares of Nᵀ·E·A, so that entry by entry, each is rounded after adding what
    the errors of the rows before it (through N) and of the columns before it (through A) ask for.
    The most important rows and columns come first: most are left to make up for their errors.

    Args:
        target: W (out, in) float32.
        start: the scales and biases; its levels are not used.
        grid: the levels.
        inputs: I (in, in) float32, positive definite.
        outputs: O (out, out) float32, positive definite.

    Returns:
        The rounded matrix, with the scales and biases of ``start``.
    """
    rows, size = len(target), grid.group_size
    block = max(ROWS, rows // BLOCKS)
    by_row, by_column = _by_importance(outputs), _by_importance(inputs)
    down = _between_blocks(_unit_upper(outputs[np.ix_(by_row, by_row)]), block)
    along = _unit_upper(inputs[np.ix_(by_column, by_column)])
    values = target[np.ix_(by_row, by_column)]
    scales, biases = (part[by_row][:, by_column // size] for part in (start.scales, start.biases))
    levels, errors = np.empty_like(values), np.empty_like(values)
    step = block * max(1, PANEL // block)
    for first in range(0, rows, step):
        panel = slice(first, min(first + step, rows))
        asked = down[:first, panel].T @ errors[:first]
        levels[panel], errors[panel] = _round_panel(
            values[panel],
            asked,
            scales[panel],
            biases[panel],
            grid,
            down[panel, panel],
            along,
            block,
        )
    found = np.empty_like(levels)
    found[np.ix_(by_row, by_column)] = levels
    return start._replace(levels=found)


def _round_panel(
    values: np.ndarray,
    asked: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    grid: Grid,
    down: np.ndarray,
    along: np.ndarray,
    block: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Some rows' levels and errors W − Q; ``asked`` is what the errors of earlier rows ask for.

    A tile depends on those above and to the left of it, so the tiles of a diagonal are independent.
    """
    high, wide = -(-values.shape[0] // block), -(-values.shape[1] // COLUMNS)
    shape = values.shape

    def tiled(array: np.ndarray, fill: float) -> np.ndarray:
        """As (row blocks, column blocks, COLUMNS, block), padded."""
        padded = np.full((high * block, wide * COLUMNS), fill, np.float32)
        padded[: shape[0], : shape[1]] = array
        return np.ascontiguousarray(
            padded.reshape(high, block, wide, COLUMNS).transpose(0, 2, 3, 1)
        )

    values, asked, biases = (tiled(part, 0) for part in (values, asked, biases))
    scales = tiled(np.where(scales == 0, 1, scales), 1)
    down = _padded(down, high * block)
    along = _padded(along, wide * COLUMNS)
    blocks = np.stack(
        [along[c : c + COLUMNS, c : c + COLUMNS] for c in range(0, len(along), COLUMNS)]
    )
    levels, errors = np.empty_like(values), np.empty_like(values)
    made = np.zeros(
        (high, wide * COLUMNS, block), np.float32
    )  # errors, for the columns to the right
    for diagonal in range(high + wide - 1):
        rs = np.arange(max(0, diagonal - wide + 1), min(high, diagonal + 1))
        cs = diagonal - rs
        for r, c in zip(rs, cs, strict=True):
            if r:
                above = errors[:r, c].transpose(1, 0, 2).reshape(COLUMNS, -1)
                asked[r, c] += above @ down[: r * block, r * block : (r + 1) * block]
        wanted = (values[rs, cs] + asked[rs, cs]).transpose(1, 0, 2)  # (COLUMNS, tiles, block)
        shift = np.empty_like(wanted)
        for i, (r, c) in enumerate(zip(rs, cs, strict=True)):
            left = c * COLUMNS
            shift[:, i] = along[:left, left : left + COLUMNS].T @ made[r, :left]
        own = np.ascontiguousarray(blocks[cs].transpose(1, 2, 0))[..., None]  # (from, to, tiles, 1)
        s, b = (part[rs, cs].transpose(1, 0, 2) for part in (scales, biases))
        level, error = np.empty_like(wanted), np.empty_like(wanted)
        for k in range(COLUMNS):
            level[k] = grid.nearest((wanted[k] + shift[k] - b[k]) / s[k])
            error[k] = wanted[k] - level[k] * s[k] - b[k]
            shift[k + 1 :] += own[k, k + 1 :] * error[k]
        error, level = error.transpose(1, 0, 2), level.transpose(1, 0, 2)
        levels[rs, cs] = level
        errors[rs, cs] = error - asked[rs, cs]
        for r, c, tile in zip(rs, cs, error, strict=True):
            made[r, c * COLUMNS : (c + 1) * COLUMNS] = tile

    def flat(array: np.ndarray) -> np.ndarray:
        whole = array.transpose(0, 3, 1, 2).reshape(high * block, wide * COLUMNS)
        return whole[: shape[0], : shape[1]]

    return flat(levels), flat(errors)


def _by_importance(matrix: np.ndarray) -> np.ndarray:
    return np.argsort(-np.diag(matrix), kind="stable")


def _padded(matrix: np.ndarray, size: int) -> np.ndarray:
    """The matrix within an identity of this size."""
    padded = np.eye(size, dtype=np.float32)
    padded[: len(matrix), : len(matrix)] = matrix
    return padded


def _unit_upper(matrix: np.ndarray) -> np.ndarray:
    """U, unit upper triangular, such that matrix = U·D·Uᵀ with a diagonal D."""
    turned = np.ascontiguousarray(matrix[::-1, ::-1])
    factor = np.array(cholesky(mx.array(turned)))[::-1, ::-1]
    return np.ascontiguousarray(factor / np.diag(factor))


def _between_blocks(upper: np.ndarray, block: int) -> np.ndarray:
    """U with each block of columns multiplied by the inverse of its diagonal block."""
    found = upper.copy()
    for start in range(0, len(upper), block):
        for k in range(start + 1, min(start + block, len(upper))):
            found[:, k] -= found[:, start:k] @ upper[start:k, k]
    return found
