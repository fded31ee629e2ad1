"""The options of ``export`` and ``upload``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import ClassVar

from tlora_mlx.config.help_groups import EXPORT, Groups
from tlora_mlx.config.option import Config, flag, option
from tlora_mlx.errors import UserError

# PEFT's combination types, as tlora_mlx.adapters.combine implements them.
COMBINATIONS = ("cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd")
COMBINATIONS += ("dare_ties", "dare_ties_svd")

# The types of a GGUF model's weights (tlora_mlx.storage.gguf_file).
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

# The export formats, and the options that apply to only some of them.
FORMATS = ("peft", "mlx-lm", "merged", "gguf", "run")
FORMATS_OF_OPTION = {
    "layout": ("peft",),
    "names": ("peft",),
    "dtype": ("peft", "mlx-lm", "gguf", "run"),
    "merged": ("gguf",),
    "outtype": ("gguf",),
    "dequantize": ("merged",),
    "quantize": ("merged",),
    "rounding": ("merged",),
    "bits": ("merged",),
    "target_bpw": ("merged",),
    "data": ("merged",),
    "push_to": ("peft", "mlx-lm", "merged", "gguf"),
}


@dataclass(kw_only=True)
class AdapterOptions(Config):
    """One adapter directory, or several combined into one."""

    run: str | None = option(
        None, "run directory, or an adapter of PEFT or mlx-lm", positional=True
    )
    adapter: list[str] | None = option(
        None,
        "instead of RUN: adapters to combine into one (runs, or adapters of PEFT or mlx-lm), each "
        "as PATH:WEIGHT; the default weight is 1",
    )
    combine: str = option(
        "cat",
        "how to combine, by PEFT's names: cat is the exact sum, and ranks add up; svd cuts it to "
        "--svd-rank; linear adds A and B separately, which is roughly the sum; ties and dare_… "
        "prune to --density",
        choices=COMBINATIONS,
    )
    density: float | None = option(
        None, "share of the entries that ties and dare_… keep; they need it", above=0.0, at_most=1.0
    )
    svd_rank: int | None = option(
        None, "rank that svd and …_svd cut to; default: the adapters' largest rank", at_least=1
    )
    majority_sign_method: str | None = option(
        None,
        "ties: total (default) takes the sign of the sum, frequency the most frequent sign",
        choices=("total", "frequency"),
    )
    seed: int = option(0, "seed for the random choice of dare_…", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.run is None) == (self.adapter is None):
            raise UserError("give either RUN or --adapter PATH:WEIGHT …; see --help")
        prunes = "ties" in self.combine or "dare" in self.combine
        if self.adapter and prunes and self.density is None:
            raise UserError(f"--combine {self.combine} needs --density")
        unused = {
            "combine": self.combine != "cat" and not self.adapter,
            "density": self.density is not None and not prunes,
            "svd-rank": self.svd_rank is not None and not self.combine.endswith("svd"),
            "majority-sign-method": self.majority_sign_method and "ties" not in self.combine,
        }
        for name in (name for name, fault in unused.items() if fault):
            where = f"with --combine {self.combine}" if self.adapter else "without --adapter"
            raise UserError(f"--{name} does nothing {where}; leave it out")


@dataclass(kw_only=True)
class ExportCommand(AdapterOptions):
    """``python -m tlora_mlx.export``, and the configuration of ``tlora_mlx.export``.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is not allowed for its option.
    """

    groups: ClassVar[Groups] = EXPORT

    format: str = option(
        "peft",
        "peft: an adapter for PEFT, vLLM, SGLang, TGI, llama.cpp; mlx-lm: one for mlx-lm; "
        "merged: the whole model with the adapter in its weights; gguf: an adapter for llama.cpp "
        "or, with --merged, the whole model for llama.cpp, Ollama and LM Studio; run: a run "
        "directory, made from another tool's adapter or from several",
        choices=FORMATS,
    )
    output: str | None = option(None, "directory to create; default: RUN-FORMAT")
    layout: str = option(
        "portable",
        "portable: one rank and scale for all modules, right in every reader; compact: exact ranks "
        "through rank_pattern and alpha_pattern, for PEFT, transformers and vLLM from 0.32",
        choices=("portable", "compact"),
    )
    names: str = option(
        "multimodal",
        "module names in an adapter for a multimodal model: multimodal: those of the whole model, "
        "which vLLM, SGLang and AutoModelForImageTextToText load; text: those of its language "
        "model alone",
        choices=("multimodal", "text"),
    )
    dtype: str = option(
        "float32",
        "dtype of an adapter's tensors",
        choices=("float32", "float16", "bfloat16"),
    )
    base_model: str | None = option(
        None,
        "the base model: the Hub repository to name in the export, the repository or directory "
        "whose weights to merge into, or the model that another tool's adapter is for; default: "
        "the one that the adapter names",
    )
    merged: bool = option(
        False, "with gguf: write the whole model, with the adapter in its weights"
    )
    outtype: str = option(
        "f16",
        "with gguf and --merged: type of the weights, by llama.cpp's names; vectors stay f32, and "
        "the embeddings of a q4 or q5 file are q8_0",
        choices=OUTTYPES,
    )
    dequantize: bool = option(
        False, "with merged: merge into the run's own quantized model, and write it dense"
    )
    quantize: bool = option(
        False,
        "with merged: merge into the run's own quantized model, quantize it again, and say how "
        "much of the adapter survives",
    )
    rounding: str | None = option(
        None,
        "how --quantize rounds: compensated: by the run's data, so that errors make up for each "
        "other where the loss depends on them; nearest: without data; default: compensated, if "
        "there is data to go by",
        choices=("compensated", "nearest"),
    )
    data: str | None = option(
        None, "what --quantize rounds by, as for train; default: the data that the run names"
    )
    bits: str | None = option(
        None,
        "auto: --quantize chooses each module's bits by the run's data, from 2, 3, 4, 5, 6 and 8: "
        "more where the loss minds rounding more, within the model's own size or --target-bpw; "
        "default: every module keeps its bits",
        choices=("auto",),
    )
    target_bpw: float | None = option(
        None,
        "with --bits auto: bits per weight of the whole model, at most, scales and embeddings "
        "counted",
        above=0.0,
    )
    push_to: str | None = option(
        None,
        "also push it to the Hugging Face Hub, as USER/NAME, which is created if missing",
    )
    private: bool = option(False, "with --push-to: make the repository a private one")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (f for f in fields(self) if getattr(self, f.name) != f.default)
        wrong = [
            flag(f.name) for f in given if self.format not in FORMATS_OF_OPTION.get(f.name, FORMATS)
        ]
        if wrong:
            why = ", which no other tool loads" if wrong == ["--push-to"] else ""
            raise UserError(
                f"{' and '.join(wrong)} cannot be used with --format {self.format}{why}"
            )
        if self.merged and self.dtype != "float32":
            raise UserError("--dtype is for an adapter; with --merged, choose --outtype")
        if self.outtype != "f16" and not self.merged:
            raise UserError("--outtype needs --merged; the type of an adapter is --dtype")
        if self.dequantize and self.quantize:
            raise UserError("--dequantize and --quantize cannot be used together")
        for name in ("rounding", "data", "bits"):
            if getattr(self, name) and not self.quantize:
                raise UserError(f"--{name} is for --quantize; leave it out")
        if self.target_bpw is not None and not self.bits:
            raise UserError("--target-bpw needs --quantize --bits auto")
        if self.bits and self.rounding == "nearest":
            raise UserError(
                "--bits auto chooses by the run's data, which --rounding nearest ignores"
            )
        if self.data and self.rounding == "nearest":
            raise UserError("--data does nothing with --rounding nearest; leave it out")
        if self.base_model and (self.dequantize or self.quantize):
            raise UserError(
                "--base-model cannot be used with --dequantize or --quantize, which merge into the "
                "run's own model"
            )
        if self.private and self.push_to is None:
            raise UserError("--private needs --push-to USER/NAME")
        if self.adapter and not self.output:
            raise UserError("--adapter needs --output")

    @property
    def kind(self) -> str:
        """The format, and whether it is the whole model or an adapter if it could be either."""
        return f"{self.format}-merged" if self.merged else self.format


@dataclass(kw_only=True)
class UploadCommand(Config):
    """``python -m tlora_mlx.upload``."""

    directory: str = option(MISSING, "directory that tlora export wrote", positional=True)
    repository: str = option(
        MISSING, "USER/NAME on the Hugging Face Hub; created if missing", positional=True
    )
    private: bool = option(False, "make the repository a private one")
