"""Proof of an export: read back what was written, and compare the deltas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import Delta, adapter_delta
from tlora_mlx.errors import RunError, UserError
from tlora_mlx.storage.blocks import blocks
from tlora_mlx.storage.safetensors import FLOATS

# Rounding to a dtype with p significant bits is off by at most 2^-p of the value, or by half the
# smallest subnormal number.
ROUNDING = {"float32": (2.0**-24, 0.0), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0.0)}

# A float32 sum that is recomputed may add its terms in another order.
NOISE = 2.0**-20


@dataclass
class Errors:
    """How far the written Δ is from the adapter's Δ in a module, or in some of its rows.

    Attributes:
        largest: the largest |written - Δ| of any entry.
        squares: Σ (written - Δ)².
        delta: Σ Δ².
        along: Σ written · Δ.
    """

    largest: float = 0.0
    squares: float = 0.0
    delta: float = 0.0
    along: float = 0.0

    @staticmethod
    def of(error: np.ndarray, delta: np.ndarray) -> Errors:
        """Measure ``written - delta`` and ``delta``, float32 of the same shape."""
        error, delta = error.reshape(-1), delta.reshape(-1)
        squares = float(delta @ delta)
        along = squares + float(error @ delta)
        return Errors(_largest(error), float(error @ error), squares, along)

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            max(self.largest, other.largest),
            self.squares + other.squares,
            self.delta + other.delta,
            self.along + other.along,
        )

    @property
    def relative(self) -> float:
        """‖written - Δ‖ / ‖Δ‖, in Frobenius norms."""
        if not self.squares:
            return 0.0
        return math.sqrt(self.squares / self.delta) if self.delta else math.inf

    @property
    def surviving(self) -> float:
        """⟨written, Δ⟩ / ‖Δ‖²: the share of Δ that was written."""
        return self.along / self.delta if self.delta else 1.0


@dataclass
class Proof:
    """What reading an export back has shown; every writer returns one.

    Attributes:
        directory: the export.
        modules: each module's errors, by its full name.
    """

    directory: Path
    modules: dict[str, Errors] = field(default_factory=dict)

    def add(self, name: str, errors: Errors) -> None:
        """Add the errors of some rows of a module."""
        self.modules[name] = self.modules.get(name, Errors()) + errors

    @property
    def total(self) -> Errors:
        """The errors of all modules together."""
        return sum(self.modules.values(), Errors())

    def worst(self, key: Callable[[Errors], float]) -> str:
        """The module with the largest value of ``key``."""
        return max(self.modules, key=lambda name: key(self.modules[name]))

    def summary(self) -> str:
        """One line for the user."""
        if not self.modules:
            return "nothing to verify: no module has an adapter"
        total = self.total
        worst = f" in {self.worst(lambda errors: errors.largest)}" if total.largest else ""
        return (
            f"verified {len(self.modules)} modules: max absolute error {total.largest:.2g}{worst} "
            f"(relative {total.relative:.2g})"
        )


def prove_adapter(
    adapter: Adapter, read: Callable[[str], Delta | None], dtype: str, output: Path
) -> Proof:
    """Compare an adapter that was read back with the original, module by module.

    If the factors are equal, so is their product. Otherwise it is computed, and its entries may
    differ by as much as rounding A and B to ``dtype`` can cause.

    Args:
        adapter: the original.
        read: gives a module's Δ, by its MLX name, as readers of the format compute it; None if
            the file has no adapter for it.
        dtype: that of the written tensors.
        output: the final name of the directory.

    Raises:
        RunError: a module's Δ differs.
    """
    unit, least = ROUNDING[dtype]
    proof = Proof(output)
    for name, module in adapter.plan.modules.items():
        expected, written = adapter_delta(adapter, name), read(name)
        nothing = Delta(
            np.zeros((module.out_features, 1), np.float32),
            np.zeros((1, module.in_features), np.float32),
        )
        wanted, found = expected or nothing, written or nothing
        if found.b.shape[0] != module.out_features or found.a.shape[1] != module.in_features:
            raise mismatch_error(name)
        if _same(found, wanted):
            if expected is not None:
                proof.add(name, Errors())
            continue
        # |Σ b·a| ≤ ‖b‖ ‖a‖, plus what rounding to dtype's subnormal numbers may add.
        b = np.sqrt(np.square(wanted.b).sum(axis=1, keepdims=True))
        a = np.sqrt(np.square(wanted.a).sum(axis=0, keepdims=True))
        floor = least * max(1.0, abs(module.scale)) * math.sqrt(wanted.b.shape[1])
        for start, stop in blocks(module.out_features, module.in_features):
            delta = wanted.rows(start, stop).product()
            error = found.rows(start, stop).product() - delta
            allowed = b[start:stop] * a * (2 * unit + unit**2 + NOISE)
            allowed += floor * (b[start:stop] + a)
            if not (np.abs(error) <= allowed).all():
                raise mismatch_error(name)
            if expected is not None:
                proof.add(name, Errors.of(error, delta))
    return proof


def _same(found: Delta, wanted: Delta) -> bool:
    """Whether the factors are the same, apart from padding with zeros."""
    rank = wanted.b.shape[1]
    padding = found.b[:, rank:].any() and found.a[rank:].any()
    same = np.array_equal(found.b[:, :rank], wanted.b) and np.array_equal(found.a[:rank], wanted.a)
    return same and not padding


def compare_merged(
    name: str, weight: np.ndarray, merged: np.ndarray, delta: np.ndarray, dtype: str
) -> Errors:
    """Compare the written W + Δ with W and Δ; rounding to ``dtype`` is allowed.

    Args:
        name: the weight's name.
        weight: W, float32; this array and the next are overwritten.
        merged: what was written, as float32.
        delta: Δ.
        dtype: that of the written weight.

    Raises:
        UserError: W + Δ is not finite.
        RunError: it is off by more than rounding.
    """
    unit, least = ROUNDING[dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.subtract(merged, weight, out=weight)
        error -= delta
        errors = Errors.of(error, delta)
        np.abs(error, out=error)
        np.abs(merged, out=merged)
        floor = NOISE * (float(merged.max()) + _largest(delta)) + least
        if not np.isfinite(floor) or not np.isfinite(errors.squares):
            raise UserError(
                f"{name} with its delta is not finite in {dtype}: the delta is too large for it, "
                "or the base model's weight is damaged"
            )
        if errors.largest > floor:  # what rounding may add grows with the value
            merged *= unit * (1 + 2 * unit)
            if np.subtract(error, merged, out=error).max() > floor:
                raise mismatch_error(name)
    return errors


def _largest(values: np.ndarray) -> float:
    """The largest absolute value."""
    return float(max(values.max(), -values.min()))


def cast_finite(tensors: Mapping[str, mx.array], dtype: str) -> dict[str, mx.array]:
    """Cast tensors to the dtype named ``float32``, ``float16`` or ``bfloat16``.

    Raises:
        UserError: there is no such dtype, or values overflow; all such tensors are named.
    """
    if dtype not in FLOATS.values():
        raise UserError(f"dtype {dtype!r} is none of {', '.join(FLOATS.values())}")
    cast = {key: value.astype(getattr(mx, dtype)) for key, value in tensors.items()}
    overflown = [key for key, value in cast.items() if not mx.isfinite(value).all().item()]
    if overflown:
        raise UserError(f"{', '.join(overflown)} overflow {dtype}; use --dtype bfloat16 or float32")
    return cast


def mismatch_error(name: str) -> RunError:
    """The error for a module that was not written correctly."""
    return RunError(
        f"what was written for {name} is wrong, so the export was deleted; check the disk and the "
        "memory, and export again"
    )
