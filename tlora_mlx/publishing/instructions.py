"""The kinds of export, as their model cards present them: library, relation and loading code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from shlex import quote

from tlora_mlx.adapters.readers import Reading, largest_rank, readings, vllm_rank
from tlora_mlx.adapters.registry import read_adapter
from tlora_mlx.models.families import FAMILIES
from tlora_mlx.models.names import respelled
from tlora_mlx.publishing.presentation import Export, code


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
            blocks += [
                f"{'vLLM' if len(serving) == 2 else serving[0]}:\n",
                code("bash", command),
            ]
        if "llama.cpp" in right:
            blocks += [
                "llama.cpp, with the base model as GGUF:\n",
                code(
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
            code(
                "python",
                "from peft import PeftModel",
                f"from transformers import {loader}, AutoTokenizer",
                "",
                f"model = {loader}.from_pretrained({self.base!r})",
                f"model = PeftModel.from_pretrained(model, {self.name!r})",
                f"tokenizer = AutoTokenizer.from_pretrained({self.base!r})",
            ),
            "mlx-lm, after PEFT has merged it:\n",
            code(
                "python",
                'model.merge_and_unload().save_pretrained("merged")',
                'tokenizer.save_pretrained("merged")',
            ),
            code("bash", 'mlx_lm.generate --model merged --prompt "…"'),
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
            code("bash", f'mlx_lm.generate {options} --prompt "…"', f"mlx_lm.server {options}"),
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
        mlx_lm = ["mlx-lm:\n", code("bash", command)]
        if "quantization" in self._config:
            return mlx_lm
        loader = _auto_class(self.family)
        return [
            "transformers:\n",
            code(
                "python",
                f"from transformers import {loader}, AutoTokenizer",
                "",
                f"model = {loader}.from_pretrained({self.name!r})",
                f"tokenizer = AutoTokenizer.from_pretrained({self.name!r})",
            ),
            "vLLM:\n",
            code("bash", f"vllm serve {quote(self.name)}"),
            *mlx_lm,
            *self._download_blocks(),
            "llama.cpp:\n",
            code("bash", f"python convert_hf_to_gguf.py {self._local} --outfile model.gguf"),
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
            code("bash", f"llama-cli -m base.gguf --lora {self._local}/adapter.gguf"),
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
            code("bash", f"llama-cli -m {self._local}/model.gguf"),
            "Ollama:\n",
            code(
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
