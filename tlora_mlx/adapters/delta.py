"""What an adapter adds to a weight: Δ = scale·B·A, kept as two factors and formed row by row."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from tlora_mlx.adapters.adapter import Adapter


class Delta(NamedTuple):
    """Δ (out, in) = ``b`` @ ``a``, float32.

    Attributes:
        b: (out, rank), the scale folded in.
        a: (rank, in).
    """

    b: np.ndarray
    a: np.ndarray

    def rows(self, start: int, stop: int) -> Delta:
        """Some rows of Δ, as factors."""
        return Delta(self.b[start:stop], self.a)

    def transposed(self) -> Delta:
        """Δᵀ, (in, out)."""
        return Delta(np.ascontiguousarray(self.a.T), np.ascontiguousarray(self.b.T))

    def product(self, out: np.ndarray | None = None) -> np.ndarray:
        """Δ itself."""
        return np.matmul(self.b, self.a, out=out)


def float32(tensor: mx.array) -> np.ndarray:
    """Convert an MLX array to a float32 numpy array."""
    return np.array(tensor.astype(mx.float32))


def adapter_delta(adapter: Adapter, name: str) -> Delta | None:
    """Δ of a module; None if the module is not adapted."""
    module = adapter.plan.modules[name]
    if not module.rank:
        return None
    b = float32(adapter.tensors[f"{name}.lora_b"]).T * np.float32(module.scale)
    a = float32(adapter.tensors[f"{name}.lora_a"]).T
    return Delta(np.ascontiguousarray(b), np.ascontiguousarray(a))
