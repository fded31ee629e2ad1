"""A model's safetensors files, and which tensor is in which, by the index or by their headers."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from tlora_mlx.errors import UserError
from tlora_mlx.models.compatibility import shared_config
from tlora_mlx.models.model_directory import (
    INDEX,
    MODEL_FILES,
    find_model,
    read_index,
    read_model_config,
    weight_files,
)
from tlora_mlx.storage.files import copy_file, write_text
from tlora_mlx.storage.foreign import file_in
from tlora_mlx.storage.safetensors import TensorFile


class ModelWeights:
    """A model directory whose weight files' headers are read and checked, but not their tensors.

    The files are those that the index names or, without an index, all that mlx-lm loads.

    Attributes:
        name: the user's name for it.
        path: the directory.
        config: the contents of ``config.json``.
        files: the weight files by name.
        file_of: the file of each tensor, in the order of the files.

    Args:
        name: a directory or a Hub repository.

    Raises:
        UserError: it does not exist, is not a model, holds only pickled weights, its index names a
            file outside the directory or places a tensor in the wrong file, a tensor is in two
            files, or a file is damaged.
    """

    def __init__(self, name: str):
        self.name, self.path = find_model(name)
        self.config = read_model_config(self.path, self.name)
        placed = read_index(self.path)
        shards = [file.name for file in weight_files(self.path, name)]
        self.files = {
            shard: TensorFile(file_in(self.path, shard), "a weight file of the model")
            for shard in shards
        }
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
            raise UserError(
                f"the weights of model {self.name} are inconsistent: {'; '.join(faults)}"
            )

    def copy_index(self, output: Path) -> None:
        """Copy the index of the weights, if there is one."""
        if (self.path / INDEX).exists():
            copy_file(file_in(self.path, INDEX), output / INDEX)

    def copy_other_files(self, output: Path) -> None:
        """Copy what mlx-lm and transformers need besides the weights and their index.

        Settings that mlx-lm would miss are added to ``config.json`` under its own names.
        """
        # A tokenizer's further templates (transformers, utils/hub.py, CHAT_TEMPLATE_DIR).
        templates = self.path / "additional_chat_templates"
        for source in sorted([*self.path.iterdir(), *templates.glob("*.jinja")]):
            wanted = any(fnmatch(source.name, pattern) for pattern in MODEL_FILES)
            # An index of other weights, or an adapter that happens to be here, would mislead.
            if fnmatch(source.name, "*.index.json") or source.name == "adapter_config.json":
                continue
            if wanted and source.is_file():
                name = source.relative_to(self.path)
                copy_file(file_in(self.path, name), output / name)
        if self.shared_config != self.config:
            write_model_config(output, self.shared_config)

    @cached_property
    def shared_config(self) -> dict[str, Any]:
        """The configuration that mlx-lm and transformers read alike, if there is one."""
        return shared_config(self.config, self.path) or self.config


def write_model_config(directory: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``; an Infinity is kept, since transformers and mlx-lm read it."""
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
