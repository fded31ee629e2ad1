"""The numbers that a quantized weight can hold: level · scale + bias, group by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

# The byte of a scale of 1: E8M0's exponent, and E4M3 (mlx/backend/cpu/quantized.cpp).
_UNIT_SCALES = {"mxfp4": 127, "mxfp8": 127, "nvfp4": 56}


class Grouped(NamedTuple):
    """A quantized matrix taken apart, float32.

    Attributes:
        levels: (out, in): the codes of an affine weight, the numbers of an FP4 or FP8 one.
        scales: (out, groups).
        biases: (out, groups); zeros if the mode has none.
    """

    levels: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    def dense(self) -> np.ndarray:
        """The matrix that it stands for, (out, in)."""
        size = self.levels.shape[1] // self.scales.shape[1]
        spread = (np.repeat(part, size, axis=1) for part in (self.scales, self.biases))
        scales, biases = spread
        return self.levels * scales + biases


class Grid:
    """How one weight is quantized, and what that can represent.

    Args:
        settings: ``group_size``, ``bits`` and ``mode``, as ``mx.quantize`` takes them.
        dtype: that of the scales.
    """

    def __init__(self, settings: Mapping[str, Any], dtype: mx.Dtype):
        self.group_size, self.bits = settings["group_size"], settings["bits"]
        self.is_affine = settings["mode"] == "affine"
        self._settings, self._dtype = dict(settings), dtype
        codes = np.arange(2**self.bits)
        if self.is_affine:
            self._levels, self._codes = codes.astype(np.float32), codes
        else:
            rows = np.resize(codes, (1, 256))
            levels = np.array(self.levels(mx.array(self._packed(rows))))[0, : len(codes)]
            self._codes = np.argsort(levels, kind="stable")
            self._codes = self._codes[np.isfinite(levels[self._codes])]
            self._levels = levels[self._codes]
        self._edges = (self._levels[1:] + self._levels[:-1]) / 2

    def nearest(self, units: np.ndarray) -> np.ndarray:
        """The level nearest to each number, which is in units of its group's scale."""
        if self.is_affine:
            return np.clip(np.rint(units), 0, self._levels[-1])
        return self._levels[np.searchsorted(self._edges, units)]

    def take_apart(self, parts: Sequence[mx.array]) -> Grouped:
        """A stored weight's levels, scales and biases.

        Args:
            parts: the packed weight (out, words), scales and, if affine, biases (out, groups).
        """
        weight, scales, *biases = parts
        if self.is_affine:
            values = scales, biases[0]
            found = [np.array(part.astype(mx.float32)) for part in values]
        else:
            ones = np.full((weight.shape[0], scales.shape[1] * self.group_size), 1.0)
            dense = np.array(self._dequantized(mx.array(self._pack_levels(ones)), scales))
            found = [dense[:, :: self.group_size], np.zeros(scales.shape, np.float32)]
        return Grouped(np.array(self.levels(weight)), *found)

    def put_together(self, grouped: Grouped, scales: mx.array) -> list[np.ndarray]:
        """The bytes of a matrix's parts; in FP modes, those of ``scales`` as they are stored."""
        weight = self._pack_levels(grouped.levels)
        if self.is_affine:
            values = [mx.array(grouped.scales), mx.array(grouped.biases)]
            others = [part.astype(self._dtype) for part in values]
        else:
            others = [scales]
        return [weight.view(np.uint8), *(np.array(part.view(mx.uint8)) for part in others)]

    def stored(self, values: np.ndarray) -> np.ndarray:
        """Scales or biases as the file's dtype rounds them, float32."""
        return np.array(mx.array(values).astype(self._dtype).astype(mx.float32))

    def levels(self, weight: mx.array) -> mx.array:
        """A packed weight's levels, (out, in) float32; they are not evaluated."""
        shape = weight.shape[0], weight.shape[1] * 32 // self.bits // self.group_size
        if self.is_affine:
            return self._dequantized(weight, mx.ones(shape), mx.zeros(shape))
        unit = _UNIT_SCALES[self._settings["mode"]]
        return self._dequantized(weight, mx.full(shape, unit, dtype=mx.uint8))

    def _dequantized(self, *parts: mx.array) -> mx.array:
        return mx.dequantize(*parts, **self._settings, dtype=mx.float32)

    def _pack_levels(self, levels: np.ndarray) -> np.ndarray:
        if not self.is_affine:
            levels = self._codes[np.searchsorted(self._levels, levels)]
        return self._packed(levels)

    def _packed(self, codes: np.ndarray) -> np.ndarray:
        """Codes (out, in) as MLX packs them: one stream of bits per row, the lowest first."""
        bits = np.unpackbits(
            codes.astype(np.uint8)[..., None], axis=-1, count=self.bits, bitorder="little"
        )
        rows = bits.reshape(len(codes), -1)
        return np.packbits(rows, axis=-1, bitorder="little").view(np.uint32)
