"""What an adapter format does: recognise a directory, read it, and write one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.proof import Proof
from tlora_mlx.models.names import MLXPart
from tlora_mlx.storage.files import Finish

CONFIG = "adapter_config.json"


class AdapterFormat(ABC):
    """How one tool stores a LoRA adapter in a directory.

    Attributes:
        name: its name in commands and configurations.
        title: its name in sentences.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a directory with this ``adapter_config.json`` has this format."""

    @abstractmethod
    def read(self, directory: Path, config: Mapping[str, Any]) -> Adapter:
        """Read a directory that was recognised, keeping its own module names.

        Raises:
            UserError: it is incomplete, or more than LoRA on linear layers.
        """

    @abstractmethod
    def write(
        self,
        adapter: Adapter,
        output: Path,
        dtype: str = "float32",
        base_model: str | None = None,
        *,
        finish: Finish | None = None,
    ) -> Proof:
        """Write an adapter that is bound to a model, and read it back.

        Args:
            adapter: the adapter.
            output: directory to create; must be new or empty.
            dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.
            base_model: the model that the export names as its base; None: the adapter's own.
            finish: called with the directory before it appears under its final name.

        Raises:
            UserError: a value overflows ``dtype``, the format cannot express the adapter, or
                ``output`` exists.
            RunError: writing failed, or what was read back differs; nothing is left behind.
        """

    def mlx_parts(self, adapter: Adapter, model_type: str) -> dict[str, list[MLXPart]]:
        """What each of the adapter's modules is in MLX; an empty list if unknown."""
        return {name: [MLXPart(name, None)] for name in adapter.plan.modules}
