"""The quantized MLX model that a run was trained on, with weights read row by row."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import float32
from tlora_mlx.errors import UserError
from tlora_mlx.merging.grid import Grid
from tlora_mlx.merging.regridding import narrowed
from tlora_mlx.method.experts import stack_and_number
from tlora_mlx.models.weights import ModelWeights
from tlora_mlx.storage.safetensors import FLOATS, StoredTensor, TensorFile


class StoredWeight:
    """A weight of a converted model: quantized, with its scales (and biases), or not.

    Attributes:
        shape: that of the dense weight; (experts, out, in) for stacked experts.
        rows: the number of rows, all leading dimensions together.
        dtype: the file format's code for the dense weight: that of the scales, which is what the
            model computes in; bfloat16 if they are not floats (mxfp4, mxfp8, nvfp4).
        parts: its tensors' names.
        modules: the adapted modules that it holds (itself, or some of its experts), with their
            range of rows: the first, and the one after the last.
        before: this weight as its model has it, if ``at`` gave it other bits; or itself.

    Args:
        base: the converted model.
        name: the module's name.

    Raises:
        UserError: the tensors do not match each other or the settings.
    """

    def __init__(self, base: ModelWeights, name: str):
        self.name = name
        self.modules: dict[str, tuple[int, int]] = {}
        self.before = self
        parts = [f"{name}.{part}" for part in ("weight", "scales", "biases")]
        self.parts = [part for part in parts if part in base.file_of]
        weight = base.file_of[parts[0]].entries[parts[0]]
        self.shape, self.dtype, self._settings = weight.shape, weight.dtype, {}
        if parts[1] in base.file_of:
            scales = base.file_of[parts[1]].entries[parts[1]]
            self._settings = settings = _settings(base, name)
            try:
                width = scales.shape[-1] * settings["group_size"]
                if weight.shape[:-1] != scales.shape[:-1] or math.prod(weight.shape[:-1]) < 1:
                    raise ValueError
                if weight.shape[-1] * 32 != width * settings["bits"]:
                    raise ValueError
                self.dense(base.file_of, 0, 1)
            except (ValueError, TypeError, IndexError, RuntimeError):  # MLX checks the rest
                raise UserError(
                    f"{name} of model {base.name} is not quantized as its config.json says: weight "
                    f"{weight.shape} and scales {scales.shape}, with {settings}"
                ) from None
            self.shape = (*weight.shape[:-1], width)
            self.dtype = scales.dtype if scales.dtype in FLOATS else "BF16"
        self.rows = math.prod(self.shape[:-1])

    def pieces(self) -> Iterator[tuple[int, int, str | None]]:
        """All rows in order, as (start, stop, the adapted module that owns them or None)."""
        position = 0
        for name, (start, stop) in sorted(self.modules.items(), key=lambda item: item[1]):
            if position < start:
                yield position, start, None
            yield start, stop, name
            position = stop
        if position < self.rows:
            yield position, self.rows, None

    def dense(self, files: Mapping[str, TensorFile], start: int, stop: int) -> np.ndarray:
        """Some rows, (stop - start, in) float32; the files are given by tensor name."""
        return float32(self.dequantized(self.read(files, start, stop)))

    def read(
        self, files: Mapping[str, TensorFile], start: int = 0, stop: int | None = None
    ) -> list[mx.array]:
        """Some rows of the parts, or all; the files are given by tensor name."""
        stop = self.rows if stop is None else stop
        return [files[part].rows(part, start, stop) for part in self.parts]

    def dequantized(self, parts: Sequence[mx.array]) -> mx.array:
        """What parts of this weight stand for: float32 if it is quantized, or itself."""
        if not self._settings:
            return parts[0]
        return mx.dequantize(*parts, **self._settings, dtype=mx.float32)

    def nearest(self, values: np.ndarray) -> list[mx.array]:
        """The parts that store these rows, rounded to nearest; at other bits: ``narrowed``."""
        dtype = getattr(mx, FLOATS[self.dtype])
        if self.has_changed:
            grid = self.grid()
            found = narrowed(values, grid, np.ones(values.shape[1], np.float32))
            stored = zip(grid.put_together(found, None), (mx.uint32, dtype, dtype), strict=True)
            return [mx.array(data).view(of) for data, of in stored]
        cast = mx.array(values).astype(dtype)
        return mx.quantize(cast, **self._settings) if self._settings else [cast]

    @property
    def can_be_compensated(self) -> bool:
        """Whether it is quantized, and a layer of its own: not a stack of experts."""
        return bool(self._settings) and len(self.shape) == 2

    @property
    def settings(self) -> dict[str, Any]:
        """``group_size``, ``bits`` and ``mode``, as ``mx.quantize`` takes them, if quantized."""
        return dict(self._settings)

    def at(self, bits: int) -> StoredWeight:
        """The same weight, which must be affine, quantized with so many bits."""
        other = copy.copy(self)
        other._settings = self._settings | {"bits": bits}
        return other

    @property
    def has_changed(self) -> bool:
        """Whether its bits are not those that its model has."""
        return self._settings != self.before._settings

    def layout(self, part: str, entry: StoredTensor) -> tuple[str, tuple[int, ...]]:
        """The dtype and shape in which a part is stored, given how it was stored before."""
        if part != self.parts[0] or not self._settings:
            return entry.dtype, entry.shape
        return entry.dtype, (*self.shape[:-1], self.shape[-1] * self._settings["bits"] // 32)

    def grid(self) -> Grid:
        """What the weight can represent, if it is quantized."""
        return Grid(self._settings, getattr(mx, FLOATS[self.dtype]))


def _settings(base: ModelWeights, name: str) -> dict[str, Any]:
    """How a module is quantized: its own settings, or the model's."""
    table = base.config["quantization"]
    own = table.get(name)
    table = own if isinstance(own, dict) else table
    named = {key: table[key] for key in ("group_size", "bits", "mode") if key in table}
    return {"mode": "affine", **named}


def read_conversion(adapter: Adapter, option: str) -> tuple[ModelWeights, dict[str, StoredWeight]]:
    """The quantized model that a run was trained on, and its adapted weights by module name.

    For experts, the weight is that of their stacked layer.

    Raises:
        UserError: it is incomplete, not converted by mlx-lm, or does not fit the run.
    """
    base = ModelWeights(adapter.model)
    table = base.config.get("quantization")
    if not isinstance(table, dict) or not all(
        type(table.get(key)) is int and table[key] > 0 for key in ("group_size", "bits")
    ):
        raise UserError(
            f"{option} is for runs on a quantized MLX model, but {base.name} is not one; omit it"
        )
    odd = [tensor for tensor in base.file_of if tensor.endswith(".global_scale")]
    if odd:
        raise UserError(f"{option} does not support tensor scales yet: {', '.join(odd)}")
    weights: dict[str, StoredWeight] = {}
    faults: dict[str, None] = {}  # each once, in order
    for name, module in adapter.adapted().items():
        layer, number = stack_and_number(name)
        if f"{layer}.weight" not in base.file_of:
            faults[f"it has no {layer}.weight"] = None
            continue
        if layer not in weights:
            weights[layer] = StoredWeight(base, layer)
        weight, shape = weights[layer], (module.out_features, module.in_features)
        found, experts = weight.shape, 1
        if number is not None:
            experts, *found = weight.shape
        if tuple(found) != shape or (number or 0) >= experts:
            faults[f"{layer} has shape {weight.shape}, but {name} was trained on {shape}"] = None
        elif weight.dtype not in FLOATS:
            faults[f"{layer} has dtype {weight.dtype}, not {', '.join(FLOATS)}"] = None
        first = (number or 0) * module.out_features
        weight.modules[name] = first, first + module.out_features
    if faults:
        raise UserError(
            f"run {adapter.label} cannot be merged into model {base.name}: {'; '.join(faults)}"
        )
    return base, weights
