"""A model's safetensors files: which tensor is in which, by the index or by what is there."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tlora_mlx.errors import UserError
from tlora_mlx.models.model_directory import (
    MODEL_FILES,
    find_model,
    read_model_config,
    weight_files,
)
from tlora_mlx.storage.files import copy_file, read_json
from tlora_mlx.storage.safetensors import TensorFile

INDEX = "model.safetensors.index.json"


class ModelWeights:
    """A model directory, its weight files' headers read and checked; no tensor is read yet.

    The files are those that the index names, or, where there is no index, all that mlx-lm loads.

    Attributes:
        name: how the user calls it.
        path: the directory.
        config: the contents of ``config.json``.
        files: the weight files by name.
        file_of: the file of each tensor, in the order of the files.

    Args:
        name: a directory or a Hub repository.

    Raises:
        UserError: it does not exist, is no model's, holds pickled weights only, its index names a
            file outside of the directory or a tensor that is not where it says, a tensor is in two
            files, or a file is damaged.
    """

    def __init__(self, name: str):
        self.name, self.path = find_model(name)
        self.config = read_model_config(self.path, self.name)
        placed = _read_index(self.path / INDEX)
        shards = sorted(set(placed.values())) or [f.name for f in weight_files(self.path, name)]
        self.files = {s: TensorFile(self.path / s, "a weight file of the model") for s in shards}
        self.file_of: dict[str, TensorFile] = {}
        faults = [
            f"{tensor} is not in {shard}"
            for tensor, shard in placed.items()
            if tensor not in self.files[shard]
        ]
        for file in self.files.values():
            for tensor, _ in file.by_offset():
                if tensor in self.file_of:
                    first = self.file_of[tensor].path.name
                    faults.append(f"{tensor} is in {first} and in {file.path.name}")
                self.file_of[tensor] = file
        if faults:
            raise UserError(f"the weights of model {self.name} are not right: {'; '.join(faults)}")

    def copy_other_files(self, output: Path) -> None:
        """Copy what mlx-lm and transformers need besides the weights and their index."""
        # A tokenizer's further templates (transformers, utils/hub.py, CHAT_TEMPLATE_DIR).
        templates = self.path / "additional_chat_templates"
        for source in sorted([*self.path.iterdir(), *templates.glob("*.jinja")]):
            wanted = any(fnmatch(source.name, pattern) for pattern in MODEL_FILES)
            # An index of other weights, or an adapter that happens to lie here, would mislead.
            if fnmatch(source.name, "*.index.json") or source.name == "adapter_config.json":
                continue
            if wanted and source.is_file():
                copy_file(source, output / source.relative_to(self.path))


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor by an index; empty where there is none."""
    if not path.exists():
        return {}
    index: Any = read_json(path, "the index of the model's weights")
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"the index {path} has no table 'weight_map'")
    for tensor, shard in placed.items():
        # A name alone: in the Hub client's cache the file itself may be a link to elsewhere.
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise UserError(f"the index {path} places {tensor} in {shard!r}, no safetensors file")
        if {"/", "\\", "\0"} & set(shard):
            raise UserError(
                f"the index {path} places {tensor} in {shard!r}, outside of the model's directory"
            )
    return placed
