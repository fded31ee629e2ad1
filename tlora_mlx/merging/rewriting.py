"""A quantized model copied file by file, some of its weights written anew, at other bits too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import numpy as np

from tlora_mlx.adapters.proof import mismatch_error
from tlora_mlx.merging.conversion import StoredWeight
from tlora_mlx.models.model_directory import INDEX
from tlora_mlx.models.weights import ModelWeights, write_model_config
from tlora_mlx.storage.blocks import OpenFile, same_bytes, tensor_bytes
from tlora_mlx.storage.files import read_json, write_json
from tlora_mlx.storage.safetensors import TensorFile, tensor_size, tensors_header


class Rewriting:
    """The new weight files: complete headers, and the tensors that stay as they are.

    The others are zeros until they are written.

    Attributes:
        written: the new file of each tensor, by its name.

    Args:
        base: the model.
        weights: the weights to write, as they will be stored, by name.
        directory: to create the files in.
        stack: closes the files.
    """

    def __init__(
        self,
        base: ModelWeights,
        weights: Mapping[str, StoredWeight],
        directory: Path,
        stack: ExitStack,
    ):
        self._base, self._directory = base, directory
        self._touched = {part for weight in weights.values() for part in weight.parts}
        self._layouts = {
            name: (entry.dtype, entry.shape)
            for file in base.files.values()
            for name, entry in file.entries.items()
        }
        for weight in weights.values():
            for part in weight.parts:
                self._layouts[part] = weight.layout(part, base.file_of[part].entries[part])
        self._open: dict[str, OpenFile] = {}
        self.written: dict[str, TensorFile] = {}
        for name, file in base.files.items():
            layouts = {tensor: self._layouts[tensor] for tensor in file}
            header, starts = tensors_header(layouts, file.metadata)
            size = len(header) + sum(tensor_size(*layout) for layout in layouts.values())
            out = self._open[name] = stack.enter_context(OpenFile(directory / name, size))
            out.write(0, np.frombuffer(header, np.uint8))
            for tensor, place in starts.items():
                if tensor not in self._touched:
                    for start, data in tensor_bytes(file, tensor):
                        out.write(place + start, data)
            written = TensorFile(directory / name, "what was written")
            self.written |= dict.fromkeys(file, written)

    def write(self, weight: StoredWeight, start: int, parts: Sequence[np.ndarray]) -> list[str]:
        """Write some rows of a weight's parts, from row ``start`` on; returns their digests."""
        for part, data in zip(weight.parts, parts, strict=True):
            file = self.written[part]
            place = file.entries[part].start + start * data.shape[1]
            self._open[file.path.name].write(place, np.ascontiguousarray(data))
        return [sha256(data).hexdigest() for data in parts]

    def sync(self) -> None:
        """Wait until everything is on disk."""
        for file in self._open.values():
            file.sync()

    def write_settings(self, weights: Mapping[str, StoredWeight]) -> None:
        """Write ``config.json``, and the index, anew if they say something else of these weights.

        A module's own settings are under its path, as mlx-lm writes them (mlx_lm/utils.py,
        ``quantize_model``).
        """
        changed = {n: w.settings for n, w in weights.items() if w.has_changed}
        if not changed:
            return
        config = dict(self._base.shared_config)
        config["quantization"] = config["quantization"] | changed
        if "quantization_config" in config:
            config["quantization_config"] = config["quantization"]
        write_model_config(self._directory, config)
        if (self._directory / INDEX).exists():
            index = read_json(self._directory / INDEX, "the index of the model's weights")
            index["metadata"] = (index.get("metadata") or {}) | {"total_size": self.size}
            write_json(self._directory / INDEX, index)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_size(*layout) for layout in self._layouts.values())

    def prove_copies(self) -> None:
        """Compare the tensors that no weight has with the base model's, byte for byte.

        Raises:
            RunError: they differ.
        """
        for file in self._base.files.values():
            written = TensorFile(self._directory / file.path.name, "what was written")
            found = {name: (entry.dtype, entry.shape) for name, entry in written.entries.items()}
            if found != {name: self._layouts[name] for name in file}:
                raise mismatch_error(f"the header of {file.path.name}")
            for name in file.entries.keys() - self._touched:
                if not same_bytes(file, written, name):
                    raise mismatch_error("the unadapted bytes")
