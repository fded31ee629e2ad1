"""What a format of adapters does: it recognises a directory, reads it, and writes one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.proof import Proof

CONFIG = "adapter_config.json"


class AdapterFormat(ABC):
    """One tool's way to keep a LoRA adapter in a directory.

    Attributes:
        name: what commands and configurations call it.
        title: what it is called in sentences.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a directory with this ``adapter_config.json`` is of this format."""

    @abstractmethod
    def read(self, directory: Path, config: Mapping[str, Any]) -> Adapter:
        """Read a directory that was recognised, under the module names that it uses itself.

        Raises:
            UserError: it is not whole, or more than LoRA on linear layers.
        """

    @abstractmethod
    def write(
        self, adapter: Adapter, output: Path, dtype: str = "float32", base_model: str | None = None
    ) -> Proof:
        """Write an adapter that is bound to a model, and read it back.

        Args:
            adapter: what to write.
            output: directory to make; must not exist, or be empty.
            dtype: ``float32``, ``float16`` or ``bfloat16``, for A and B alike.
            base_model: the model that the export names as its own; the adapter's where it is None.

        Raises:
            UserError: a value overflows ``dtype``, the format cannot express the adapter, or
                ``output`` is taken.
            RunError: it could not be written, or not as it should be; nothing is left of it.
        """

    def mlx_names(self, adapter: Adapter, model_type: str) -> dict[str, str | None]:
        """The MLX name of each of the adapter's modules; None where it is not known."""
        return {name: name for name in adapter.plan.modules}
