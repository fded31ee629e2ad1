"""What a model card needs to know about an export of any kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar

from tlora_mlx.errors import visible
from tlora_mlx.storage.files import read_json


@dataclass(frozen=True)
class Export(ABC):
    """An exported directory, with the names for it and its base model that readers use.

    The class attributes are those of an adapter; ``MergedExport`` overrides them.

    Sources: base_model_relation, library_name and tags are the Hub's metadata of a model card
    (https://huggingface.co/docs/hub/model-cards).

    Attributes:
        directory: where the exported files are.
        name: the Hub repository, or the directory's name if there is none.
        base: the base model that it is for.
        trained_on: the model that it was trained on: the base, or a converted form of it.
        family: the base model's ``model_type``.
        relation: its ``base_model_relation``.
        tags: its ``tags``, in addition to those of every export.
        names_base: whether its configuration names a base model, which readers then load.
        config_file: the name of its configuration.
        download: the directory to which the card's commands download it.
    """

    directory: Path
    name: str
    base: str
    trained_on: str
    family: str

    relation: ClassVar[str] = "adapter"
    tags: ClassVar[tuple[str, ...]] = ("lora",)
    names_base: ClassVar[bool] = True
    config_file: ClassVar[str] = "adapter_config.json"
    download: ClassVar[str] = "adapter"

    @property
    @abstractmethod
    def library(self) -> str:
        """The Hub's ``library_name``.

        Raises:
            UserError: the configuration is needed, but is missing or not JSON.
        """

    @abstractmethod
    def loading(self) -> list[str]:
        """Markdown blocks that show how to load it, one or more per reader.

        Raises:
            UserError: the configuration is needed, but is missing or not JSON.
        """

    def described(self, base: str) -> str:
        """The start of a sentence that says what it is, however the adapter was trained.

        Args:
            base: the base model, in Markdown.
        """
        return f"A LoRA adapter of {base}"

    def described_as_trained(self, base: str, method: str) -> str:
        """The start of a sentence that says what it is and the method, up to "with TOOL".

        Args:
            base: the base model, in Markdown.
            method: the method, in Markdown.
        """
        return f"A {method} adapter of {base}, trained"

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_json(self.directory / self.config_file, "the export's configuration")

    @property
    def _is_on_hub(self) -> bool:
        return "/" in self.name

    @property
    def _local(self) -> str:
        """Its path in shell commands; if it is on the Hub, where ``_download_blocks`` puts it."""
        return self.download if self._is_on_hub else quote(self.name)

    def _download_blocks(self) -> list[str]:
        """Download commands, for readers that need a directory; empty if it is not on the Hub."""
        if not self._is_on_hub:
            return []
        command = f"hf download {self.name} --local-dir {self._local}"
        return ["The commands below need a local directory:\n", code("bash", command)]


def code(language: str, *lines: str) -> str:
    """Lines as a fenced block of Markdown."""
    # A line break in a name could end the block.
    return "\n".join([f"```{language}", *map(visible, lines), "```\n"])
