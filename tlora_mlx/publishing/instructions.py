"""The kinds of export, as their model cards present them: library, relation and loading code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar

from tlora_mlx.adapters.readers import Reading, largest_rank, readings, vllm_rank
from tlora_mlx.adapters.registry import read_adapter
from tlora_mlx.errors import visible
from tlora_mlx.models.families import FAMILIES
from tlora_mlx.models.names import respelled
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
        return ["The commands below need a local directory:\n", _code("bash", command)]


class PeftExport(Export):
    """An adapter for PEFT and, in the portable layout, for all readers of PEFT's format."""

    @property
    def library(self) -> str:
        """PEFT, for both layouts."""
        return "peft"

    def loading(self) -> list[str]:
        """PEFT, mlx-lm after merging, vLLM and llama.cpp where they are right, and all readers.

        Sources: ggml-org/llama.cpp ``convert_lora_to_gguf.py`` takes the base model from the
        adapter's configuration; vLLM refuses an adapter whose rank is above ``--max-lora-rank``.
        """
        adapter = read_adapter(self.directory)
        found = readings(adapter, self.family)
        right = {reading.reader for reading in found if not reading.fault}
        rank = vllm_rank(max(largest_rank(adapter), self._config["r"]))
        blocks = [*self._peft(adapter.plan.modules), *self._download_blocks()]
        if serving := [name for name in ("vLLM from 0.32", "vLLM before 0.32") if name in right]:
            command = (
                f"vllm serve {quote(self.base)} --enable-lora --max-lora-rank {rank} "
                f"--lora-modules tuned={self._local}"
            )
            blocks += [f"{'vLLM' if len(serving) == 2 else serving[0]}:\n", _code("bash", command)]
        if "llama.cpp" in right:
            blocks += [
                "llama.cpp, with the base model as GGUF:\n",
                _code(
                    "bash",
                    f"python convert_lora_to_gguf.py {self._local} --outfile adapter.gguf",
                    "llama-cli -m base.gguf --lora adapter.gguf",
                ),
            ]
        return [*blocks, *_readers(found)]

    def _peft(self, modules: Iterable[str]) -> list[str]:
        """PEFT, and mlx-lm after it; only in words if the language model cannot be loaded alone."""
        family = FAMILIES[self.family]
        is_text = family.text_blocks and all(
            respelled(self.family, name, text=True) == name for name in modules
        )
        if is_text and not family.text_is_auto:
            return [
                "Its names are those of the language model alone (`model.layers.…`), which "
                "transformers does not load from the multimodal checkpoint.\n"
            ]
        loader = "AutoModelForCausalLM" if is_text else _auto_class(self.family)
        return [
            "PEFT:\n",
            _code(
                "python",
                "from peft import PeftModel",
                f"from transformers import {loader}, AutoTokenizer",
                "",
                f"model = {loader}.from_pretrained({self.base!r})",
                f"model = PeftModel.from_pretrained(model, {self.name!r})",
                f"tokenizer = AutoTokenizer.from_pretrained({self.base!r})",
            ),
            "mlx-lm, after PEFT has merged it:\n",
            _code(
                "python",
                'model.merge_and_unload().save_pretrained("merged")',
                'tokenizer.save_pretrained("merged")',
            ),
            _code("bash", 'mlx_lm.generate --model merged --prompt "…"'),
        ]


class MlxLmExport(Export):
    """An adapter for mlx-lm's ``--adapter-path``."""

    @property
    def library(self) -> str:
        """MLX: nothing else reads mlx-lm's adapters."""
        return "mlx"

    def loading(self) -> list[str]:
        """mlx-lm, on the model that the adapter was trained on."""
        options = f"--model {quote(self.trained_on)} --adapter-path {self._local}"
        return [
            *self._download_blocks(),
            "mlx-lm:\n",
            _code("bash", f'mlx_lm.generate {options} --prompt "…"', f"mlx_lm.server {options}"),
            "For PEFT, vLLM and llama.cpp, export the same run with `--format peft`.\n",
        ]


class MergedExport(Export):
    """A whole model with the adapter in its weights; if it is quantized, only MLX reads it."""

    relation = "finetune"
    tags = ()
    names_base = False
    config_file = "config.json"
    download = "model"

    @property
    def library(self) -> str:
        """transformers, or MLX for a model in MLX's own quantization."""
        return "mlx" if "quantization" in self._config else "transformers"

    def described(self, base: str) -> str:
        """The same, with the base model first."""
        return f"{base} with a LoRA adapter"

    def described_as_trained(self, base: str, method: str) -> str:
        """The same, with the base model first."""
        return f"{base}, fine-tuned by {method}"

    def loading(self) -> list[str]:
        """transformers, vLLM, mlx-lm and llama.cpp; only mlx-lm for a quantized model."""
        command = f'mlx_lm.generate --model {quote(self.name)} --prompt "…"'
        mlx_lm = ["mlx-lm:\n", _code("bash", command)]
        if "quantization" in self._config:
            return mlx_lm
        loader = _auto_class(self.family)
        return [
            "transformers:\n",
            _code(
                "python",
                f"from transformers import {loader}, AutoTokenizer",
                "",
                f"model = {loader}.from_pretrained({self.name!r})",
                f"tokenizer = AutoTokenizer.from_pretrained({self.name!r})",
            ),
            "vLLM:\n",
            _code("bash", f"vllm serve {quote(self.name)}"),
            *mlx_lm,
            *self._download_blocks(),
            "llama.cpp:\n",
            _code("bash", f"python convert_hf_to_gguf.py {self._local} --outfile model.gguf"),
        ]


class GGUFExport(Export):
    """An adapter for llama.cpp's ``--lora``."""

    tags = ("lora", "gguf")
    names_base = False

    @property
    def library(self) -> str:
        """The Hub's name for llama.cpp's files."""
        return "gguf"

    def loading(self) -> list[str]:
        """llama.cpp, with the base model as GGUF."""
        return [
            *self._download_blocks(),
            "llama.cpp, with the base model as GGUF:\n",
            _code("bash", f"llama-cli -m base.gguf --lora {self._local}/adapter.gguf"),
        ]


class GGUFModelExport(MergedExport):
    """A whole model for llama.cpp, Ollama and LM Studio."""

    tags = ("gguf",)

    @property
    def library(self) -> str:
        """The Hub's name for llama.cpp's files."""
        return "gguf"

    def loading(self) -> list[str]:
        """llama.cpp and Ollama."""
        name = self.name.rsplit("/", 1)[-1]
        return [
            *self._download_blocks(),
            "llama.cpp:\n",
            _code("bash", f"llama-cli -m {self._local}/model.gguf"),
            "Ollama:\n",
            _code(
                "bash",
                f"ollama create {quote(name.lower())} -f {self._local}/Modelfile",
                f"ollama run {quote(name.lower())}",
            ),
        ]


# By ``ExportCommand.kind``; a run directory is not for publishing.
EXPORTS: dict[str, type[Export]] = {
    "peft": PeftExport,
    "mlx-lm": MlxLmExport,
    "merged": MergedExport,
    "gguf": GGUFExport,
    "gguf-merged": GGUFModelExport,
}


def _auto_class(family: str) -> str:
    """The class of transformers that loads a family's checkpoints, whole."""
    is_multimodal = family in FAMILIES and FAMILIES[family].is_multimodal
    return "AutoModelForImageTextToText" if is_multimodal else "AutoModelForCausalLM"


def _readers(found: Sequence[Reading]) -> list[str]:
    """A table of the readers, and what to export for those that get this one wrong."""
    lines = ["| reader | tried with | reads it |", "|---|---|---|"]
    lines += [f"| {r.reader} | {r.tried} | {r.fault or 'as intended'} |" for r in found]
    blocks = ["\n".join(lines) + "\n"]
    for remedy in dict.fromkeys(reading.remedy for reading in found if reading.remedy):
        readers = ", ".join(reading.reader for reading in found if reading.remedy == remedy)
        blocks.append(f"For {readers}: `tlora export {remedy}` of the same run.\n")
    return blocks


def _code(language: str, *lines: str) -> str:
    # A line break in a name could end the block.
    return "\n".join([f"```{language}", *map(visible, lines), "```\n"])
