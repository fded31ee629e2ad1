"""Code that loads an export, per reader, as its model card shows it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

from tlora_mlx.files import read_json

TRANSFORMERS = "from transformers import AutoModelForCausalLM, AutoTokenizer"


@dataclass(frozen=True)
class Export:
    """An exported directory, and what its readers call it and its base.

    Attributes:
        format: ``peft``, ``mlx-lm`` or ``merged``.
        name: the Hub repository, or else the directory's name.
        base: the base model that it is for.
        trained_on: the model that it was trained on: the base, or a conversion of it.
    """

    directory: Path
    format: str
    name: str
    base: str
    trained_on: str

    @property
    def library(self) -> str:
        """The Hub's ``library_name``."""
        if self.format == "peft":
            return "peft"
        mlx_only = self.format == "mlx-lm" or "quantization" in self._config
        return "mlx" if mlx_only else "transformers"

    @cached_property
    def _config(self) -> dict[str, Any]:
        file = "config.json" if self.format == "merged" else "adapter_config.json"
        return read_json(self.directory / file, "the export's configuration")

    def loading(self) -> list[str]:
        """Markdown blocks, one or more per reader.

        Sources: ggml-org/llama.cpp ``convert_lora_to_gguf.py`` takes the base model from the
        adapter's configuration; vLLM refuses an adapter whose rank is above ``--max-lora-rank``.
        """
        if self.format == "mlx-lm":
            return self._mlx_lm_adapter()
        return self._merged() if self.format == "merged" else self._peft()

    @property
    def _local(self) -> str:
        """The directory as the shell's commands have it, after ``_fetch`` where it is needed."""
        if "/" not in self.name:
            return quote(self.name)
        return "model" if self.format == "merged" else "adapter"

    def _fetch(self) -> list[str]:
        if "/" not in self.name:
            return []
        command = f"hf download {self.name} --local-dir {self._local}"
        return ["What follows takes a directory:\n", _code("bash", command)]

    def _mlx_lm_adapter(self) -> list[str]:
        options = f"--model {quote(self.trained_on)} --adapter-path {self._local}"
        return [
            *self._fetch(),
            "mlx-lm:\n",
            _code("bash", f'mlx_lm.generate {options} --prompt "…"', f"mlx_lm.server {options}"),
            "PEFT, vLLM and llama.cpp read the same run's export by `--format peft`.\n",
        ]

    def _merged(self) -> list[str]:
        mlx_lm = f'mlx_lm.generate --model {quote(self.name)} --prompt "…"'
        mlx_lm = ["mlx-lm:\n", _code("bash", mlx_lm)]
        if self.library == "mlx":
            return mlx_lm
        return [
            "transformers:\n",
            _code(
                "python",
                TRANSFORMERS,
                "",
                f"model = AutoModelForCausalLM.from_pretrained({self.name!r})",
                f"tokenizer = AutoTokenizer.from_pretrained({self.name!r})",
            ),
            "vLLM:\n",
            _code("bash", f"vllm serve {quote(self.name)}"),
            *mlx_lm,
            *self._fetch(),
            "llama.cpp:\n",
            _code("bash", f"python convert_hf_to_gguf.py {self._local} --outfile model.gguf"),
        ]

    def _peft(self) -> list[str]:
        return [
            "PEFT:\n",
            _code(
                "python",
                "from peft import PeftModel",
                TRANSFORMERS,
                "",
                f"model = AutoModelForCausalLM.from_pretrained({self.base!r})",
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
            *self._readers_of_one_rank(),
        ]

    def _readers_of_one_rank(self) -> list[str]:
        if self._config["rank_pattern"]:
            return [
                "vLLM and llama.cpp ignore `rank_pattern` and `alpha_pattern` without a word: they "
                "need the same run's export by `--layout portable`.\n"
            ]
        return [
            *self._fetch(),
            "vLLM:\n",
            _code(
                "bash",
                f"vllm serve {quote(self.base)} --enable-lora --max-lora-rank {self._config['r']} "
                f"--lora-modules tuned={self._local}",
            ),
            "llama.cpp, beside the base model as GGUF:\n",
            _code(
                "bash",
                f"python convert_lora_to_gguf.py {self._local} --outfile adapter.gguf",
                "llama-cli -m base.gguf --lora adapter.gguf",
            ),
        ]


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```\n"])
