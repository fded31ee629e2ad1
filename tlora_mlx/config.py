"""One typed configuration per command: it makes the command line, reads the YAML and validates.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tlora_mlx.errors import UserError
from tlora_mlx.files import read_json, user_path
from tlora_mlx.training.formats import FORMATS
from tlora_mlx.version import __version__

C = TypeVar("C")

# PEFT's combination types that tlora_mlx.exporting.combine knows.
COMBINATIONS = ("cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd")
COMBINATIONS += ("dare_ties", "dare_ties_svd")


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    positional: bool = False,
) -> Any:
    """A field of a configuration: its default (``MISSING``: required), its help and its bounds."""
    metadata = {
        "help": help,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "choices": choices,
        "positional": positional,
    }
    return (
        field(metadata=metadata)
        if default is MISSING
        else field(default=default, metadata=metadata)
    )


class Config:
    """Base of all configurations: every value is checked when one is made."""

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item, getattr(self, item.name), f"--{_dashed(item)}")

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The options that were given, and those that follow from them."""
        return given

    def to_dict(self) -> dict[str, Any]:
        """All options by their YAML names."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True)
class PlanConfig(Config):
    """What calibration and allocation need."""

    model: str = option(MISSING, "model directory, or a Hub repository that mlx-lm loads")
    data: str = option(
        MISSING,
        "directory with train.jsonl (and valid.jsonl, test.jsonl) in mlx-lm's formats, or a Hub "
        "data set, as NAME or NAME:CONFIGURATION",
    )
    format: str | None = option(
        None,
        "how rows of a well-known data set become prompt and completion; not needed where they "
        "have mlx-lm's keys",
        choices=tuple(FORMATS),
    )
    max_samples: int | None = option(
        None, "only the first so many rows of the training data", at_least=1
    )
    rank: int = option(
        8,
        "base rank: the budget is this times the number of target modules, spread by sensitivity",
        at_least=1,
    )
    alpha: float | None = option(
        None,
        "base alpha: a module's scale is at least alpha / rank; default: the rank, as in the "
        "paper (scales from 1 up; mlx-lm's one scale is 20)",
        above=0.0,
    )
    max_rank: int | None = option(
        None, "no module gets a higher rank; what is cut off goes to the others", at_least=1
    )
    target_modules: list[str] | None = option(
        None,
        "last name components of the layers to adapt, such as q_proj v_proj; default: every linear "
        "layer in the transformer blocks",
    )
    target_experts: bool = option(
        False, "adapt the experts of a mixture too, each with a rank of its own"
    )
    num_layers: int = option(
        -1,
        "adapt only the last so many blocks; -1: all (mlx-lm: 16), since the ranks are placed by "
        "sensitivity anyway",
        at_least=-1,
    )
    calibration_samples: int = option(
        256, "training samples to calibrate on, drawn by --seed; all if there are fewer", at_least=1
    )
    val_split: float | None = option(
        None,
        "share of the training rows to validate on, drawn by --seed, where the data has no "
        "validation split",
        above=0.0,
        below=1.0,
    )
    batch_size: int = option(
        4, "samples per batch, over all processes of mlx.launch together", at_least=1
    )
    max_seq_length: int = option(2048, "longer samples are cut to so many tokens", at_least=2)
    mask_prompt: bool | None = option(
        None,
        "leave the prompt out of the loss; default: yes where the data has prompts, as in the "
        "paper (mlx-lm: no)",
    )
    seed: int = option(0, "seed of sampling and data order", at_least=0)
    grad_checkpoint: bool = option(False, "recompute activations in the backward pass: less memory")
    allow_unexportable: bool = option(
        False, "go on with a model family or module whose export will be refused"
    )
    trust_remote_code: bool = option(False, "let the model's repository run its own code")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers == 0:
            raise UserError("--num-layers must be -1 (all) or at least 1, not 0")
        if self.alpha is None:
            self.alpha = float(self.rank)


@dataclass(kw_only=True)
class PlanCommand(PlanConfig):
    """``python -m tlora_mlx.plan``."""

    model: str | None = option(None, "model directory, or a Hub repository that mlx-lm loads")
    data: str | None = option(None, "directory with train.jsonl, or a Hub data set, as for train")
    sensitivities: str | None = option(
        None,
        "an earlier plan: allocate from its sensitivities by --rank, --alpha and --max-rank, "
        "without model and data",
    )
    output: str = option("plan.json", "where the plan goes; a picture beside it with matplotlib")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sensitivities is None and not (self.model and self.data):
            raise UserError("--model and --data must be given, or --sensitivities; see --help")


# What makes ranks, scales and A, where no adapter brings them.
SETS_THE_START = {"rank", "alpha", "max_rank", "target_modules", "target_experts", "num_layers"}
SETS_THE_START |= {"plan", "calibration_samples", "covariance", "calibration_memory"}


@dataclass(kw_only=True)
class TrainConfig(PlanConfig):
    """``python -m tlora_mlx.train``, and what ``tlora_mlx.train.train`` takes.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is outside of what its option allows.
    """

    adapter_path: str = option("adapters", "run directory to make")
    resume: bool = option(
        False,
        "go on with the run in --adapter-path from its newest whole checkpoint, to the same result "
        "as if it had never stopped; its options need not be given again",
    )
    plan: str | None = option(
        None, "take ranks and scales from this file of tlora plan, edited by hand or not"
    )
    from_adapter: str | None = option(
        None,
        "start from this adapter (a run, PEFT's or mlx-lm's) instead of calibrating: its ranks, "
        "scales, A and B, of which A stays frozen",
    )
    covariance: str = option(
        "auto",
        "exact keeps covariances (in × in), in as many passes over the calibration samples as "
        "--calibration-memory asks for; streaming keeps a few (in × (rank + 32)) per module "
        "and takes some 5 passes forwards; auto: exact where the one pass will do",
        choices=("auto", "exact", "streaming"),
    )
    calibration_memory: float | None = option(
        None,
        "GB that covariances may take; default: a quarter of the memory that the machine "
        "recommends for the GPU",
        above=0.0,
    )
    iters: int = option(
        1000, "optimizer updates (each takes --grad-accumulation-steps batches)", at_least=1
    )
    epochs: int | None = option(
        None, "train for so many passes over the data instead of --iters", at_least=1
    )
    optimizer: str = option(
        "adamw", "with bias correction, unlike mlx-lm's adam", choices=("adam", "adamw")
    )
    learning_rate: float = option(
        1e-4,
        "peak learning rate of B (mlx-lm: 1e-5 at scale 20; here scales start at 1)",
        above=0.0,
        below=3e38,
    )
    lr_schedule: str = option(
        "cosine",
        "after the warm-up; the paper trains with cosine or linear (mlx-lm: constant)",
        choices=("cosine", "linear", "constant"),
    )
    warmup: float = option(
        0.03,
        "share of the updates in which the rate rises from 0, as in the paper",
        at_least=0.0,
        at_most=1.0,
    )
    weight_decay: float = option(0.0, "adamw's weight decay of B", at_least=0.0)
    grad_accumulation_steps: int = option(
        1, "batches per optimizer update, weighted by their tokens", at_least=1
    )
    max_grad_norm: float = option(
        1.0,
        "the gradient is scaled down to this norm, as in transformers' trainer; 0: never (mlx-lm)",
        at_least=0.0,
    )
    skip_nonfinite: int = option(
        0,
        "leave out so many updates whose loss or gradient is not finite, instead of stopping",
        at_least=0,
    )
    val_batches: int = option(25, "validation batches per evaluation; -1: all", at_least=-1)
    steps_per_report: int = option(10, "updates between reports of the training loss", at_least=1)
    steps_per_eval: int = option(200, "updates between validations", at_least=1)
    early_stop: int | None = option(
        None,
        "stop after so many validations in a row without a lower loss than the lowest",
        at_least=1,
    )
    save_every: int = option(100, "updates between checkpoints", at_least=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep", at_least=1)
    report_to: str | None = option(
        None, "also report to wandb or swanlab, or both (wandb,swanlab), through mlx-lm"
    )
    test: bool = option(False, "report the loss on test.jsonl before and after training")

    def __post_init__(self) -> None:
        if self.from_adapter and not self.resume:
            self._refuse_with_adapter()
        super().__post_init__()
        if self.val_batches == 0:
            raise UserError("--val-batches must be -1 (all) or at least 1, not 0")

    def _refuse_with_adapter(self) -> None:
        """An adapter that is gone on from has its ranks and A already."""
        given = [
            f"--{_dashed(item)}"
            for item in fields(self)
            if item.name in SETS_THE_START and getattr(self, item.name) != item.default
        ]
        if given:
            raise UserError(
                f"{', '.join(given)} cannot be given with --from-adapter, which brings its own "
                "ranks, scales and A; leave them out"
            )

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """With ``resume``, whatever was not given is as the run in ``adapter_path`` has it.

        Under ``mlx.launch`` the directory is the first process's, which tells the others.

        Raises:
            UserError: the run's configuration is damaged.
        """
        default = cls.__dataclass_fields__["adapter_path"].default
        path = user_path(given.get("adapter_path", default)) / "adapter_config.json"
        if not given.get("resume"):
            return given
        from tlora_mlx.method.distributed import from_first, is_first

        found = is_first() and path.exists()
        stored = from_first(read_json(path, "the run's configuration") if found else None)
        if stored is None:
            return given
        if not isinstance(stored, dict):
            raise UserError(f"the run's configuration {path} is damaged; start another run")
        known = {item.name for item in fields(cls)}
        return {name: value for name, value in stored.items() if name in known} | given


@dataclass(kw_only=True)
class AdapterOptions(Config):
    """One adapter directory, or several combined into one."""

    run: str | None = option(
        None, "run directory, or a PEFT or mlx-lm adapter to take over", positional=True
    )
    adapter: list[str] | None = option(
        None,
        "PATH:WEIGHT, instead of RUN: adapters to combine into one, each a run, PEFT's or mlx-lm's;"
        " the weight is 1 where it is left out",
    )
    combine: str = option(
        "cat",
        "how, by PEFT's names: cat is the exact sum, ranks add up; svd cuts it to --svd-rank; "
        "linear adds A and B apart, a rough way; ties and dare_… prune to --density",
        choices=COMBINATIONS,
    )
    density: float | None = option(
        None, "share of entries that ties and dare_… keep", above=0.0, at_most=1.0
    )
    svd_rank: int | None = option(
        None, "rank that svd and …_svd cut to; default: the adapters' largest", at_least=1
    )
    majority_sign_method: str | None = option(
        None,
        "ties: total (default) goes by the sum's sign, frequency by the number of signs",
        choices=("total", "frequency"),
    )
    seed: int = option(0, "seed of dare_…'s random choice", at_least=0)

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
    """``python -m tlora_mlx.export``."""

    format: str = option(
        "peft",
        "peft: an adapter for PEFT, vLLM, SGLang, TGI, llama.cpp; mlx-lm: an adapter for mlx-lm; "
        "merged: the whole model with the adapter in its weights; run: a run directory, of another "
        "tool's adapter or of several",
        choices=("peft", "mlx-lm", "merged", "run"),
    )
    output: str | None = option(None, "directory to make; default: RUN-FORMAT")
    layout: str = option(
        "portable",
        "portable: one rank and scale for all modules, right in every reader; compact: exact ranks "
        "by rank_pattern and alpha_pattern, PEFT only",
        choices=("portable", "compact"),
    )
    dtype: str = option(
        "float32", "dtype of an adapter's tensors", choices=("float32", "float16", "bfloat16")
    )
    base_model: str | None = option(
        None,
        "the base model: the Hub repository that an adapter names, the repository or directory "
        "whose weights are merged, and for another tool's adapter the one to load it on; default: "
        "what the adapter names",
    )
    dequantize: bool = option(
        False, "merged: into the weights of the run's own quantized model, written dense"
    )
    quantize: bool = option(
        False,
        "merged: into the weights of the run's own quantized model, quantized again; says how much "
        "of the adapter survives",
    )
    push_to: str | None = option(
        None, "also push it to the Hugging Face Hub as USER/NAME, which is made if it is missing"
    )
    private: bool = option(False, "make the repository of --push-to private")

    def __post_init__(self) -> None:
        super().__post_init__()
        merged = self.format == "merged"
        wrong = [
            ("--layout", self.layout != "portable" and self.format != "peft"),
            ("--dtype", self.dtype != "float32" and merged),
            ("--dequantize", self.dequantize and not merged),
            ("--quantize", self.quantize and not merged),
        ]
        if names := [name for name, is_wrong in wrong if is_wrong]:
            raise UserError(f"{' and '.join(names)} cannot go with --format {self.format}")
        if self.dequantize and self.quantize:
            raise UserError("--dequantize and --quantize exclude each other")
        if self.base_model and (self.dequantize or self.quantize):
            raise UserError(
                "--base-model cannot go with --dequantize or --quantize, which merge into the "
                "run's own model"
            )
        if self.private and self.push_to is None:
            raise UserError("--private goes with --push-to USER/NAME")
        if self.adapter and not self.output:
            raise UserError("--output must be given with --adapter")
        if self.format == "run" and self.push_to is not None:
            raise UserError("--push-to cannot go with --format run, which no other tool loads")


@dataclass(kw_only=True)
class UploadCommand(Config):
    """``python -m tlora_mlx.upload``."""

    directory: str = option(MISSING, "directory that tlora export made", positional=True)
    repository: str = option(
        MISSING, "USER/NAME on the Hugging Face Hub, made if it is missing", positional=True
    )
    private: bool = option(False, "make the repository private")


@dataclass(kw_only=True)
class GenerateCommand(Config):
    """``python -m tlora_mlx.generate``."""

    run: str = option(MISSING, "run directory, or a PEFT or mlx-lm adapter", positional=True)
    prompt: str = option(MISSING, "what to complete; '-' reads it from standard input")
    max_tokens: int = option(100, "tokens to generate at most", at_least=1)
    trust_remote_code: bool = option(False, "let the model's repository run its own code")


@dataclass(kw_only=True)
class InspectCommand(Config):
    """``python -m tlora_mlx.inspect``."""

    path: str = option(MISSING, "run directory, PEFT adapter or mlx-lm adapter", positional=True)


@dataclass(kw_only=True)
class EvaluateCommand(Config):
    """``python -m tlora_mlx.evaluate``."""

    run: str = option(MISSING, "run directory that tlora_mlx.train made", positional=True)
    task: str = option(
        MISSING,
        "how rows are read and scored",
        choices=("math", "commonsense", "nlu", "code", "chat", "perplexity"),
    )
    data: str = option(
        MISSING,
        "file of rows, one JSON object a line; or a Hub data set, whose test split is taken",
    )
    format: str | None = option(
        None, "how raw rows are read; default: as the run was trained", choices=tuple(FORMATS)
    )
    output: str | None = option(None, "directory to make; default: RUN/evaluations/TASK-FILE")
    max_samples: int | None = option(None, "only the first so many rows", at_least=1)
    batch_size: int = option(8, "prompts, or choices, per batch", at_least=1)
    max_tokens: int = option(512, "tokens per answer at most", at_least=1)
    execute: bool = option(
        False,
        "run the code that the models wrote, in processes without network and with limits on time "
        "and memory; it is no sandbox",
    )
    trust_remote_code: bool = option(False, "let the model's repository run its own code")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.execute and self.task != "code":
            raise UserError("--execute is for --task code")


@dataclass(kw_only=True)
class ReportCommand(Config):
    """``python -m tlora_mlx.report``."""

    run: str = option(MISSING, "run directory that tlora_mlx.train made", positional=True)
    output: str | None = option(None, "HTML file to write; default: RUN/report.html")
    samples: int = option(
        0, "also let base model and adapter continue so many validation prompts", at_least=0
    )
    max_tokens: int = option(120, "tokens per sample at most", at_least=1)
    trust_remote_code: bool = option(False, "let the model's repository run its own code")


def parse(
    config_class: type[C],
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    also_known: type | None = None,
) -> C:
    """Make a configuration from the command line and, with ``-c``, a YAML file; flags win.

    Args:
        config_class: a subclass of ``Config``.
        prog: the command's name in the help.
        description: its first line.
        argv: the arguments; those of the process where it is None.
        also_known: a configuration whose options the YAML may hold too, to no effect.

    Raises:
        UserError: an argument, a key or a value is not right; it names the flag or the file.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tlora_mlx {__version__}")
    if issubclass(config_class, PlanConfig):
        parser.add_argument(
            "-c", "--config", metavar="FILE", help="YAML file with the same options; flags win"
        )
    for item in fields(config_class):
        _add_argument(parser, item, typing.get_type_hints(config_class)[item.name])
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    values: dict[str, Any] = {}
    if (path := given.pop("config", None)) is not None:
        values = _read_yaml(Path(path), config_class, also_known)
    values = config_class.completed(_typed(values | given, config_class))
    missing = [f for f in fields(config_class) if f.default is MISSING and f.name not in values]
    if missing:
        raise UserError(f"{' and '.join(_shown(f) for f in missing)} must be given; see --help")
    return config_class(**_typed(values, config_class))


def _typed(values: dict[str, Any], config_class: type) -> dict[str, Any]:
    """The values as their options' types."""
    hints = typing.get_type_hints(config_class)
    return {
        name: _convert(value, hints[name], f"--{name.replace('_', '-')}")
        for name, value in values.items()
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _dashed(item: dataclasses.Field) -> str:
    return item.name.replace("_", "-")


def _shown(item: dataclasses.Field) -> str:
    return item.name.upper() if item.metadata["positional"] else f"--{_dashed(item)}"


def _kind(hint: Any) -> Any:
    """The type behind an optional one: int of ``int | None``."""
    options = [h for h in typing.get_args(hint) if h is not type(None)]
    return options[0] if options and typing.get_origin(hint) is not list else hint


def _add_argument(parser: argparse.ArgumentParser, item: dataclasses.Field, hint: Any) -> None:
    """Every value arrives as text (or a flag's True or False); ``_convert`` gives it its type."""
    text = item.metadata["help"].replace("%", "%%")
    if item.default is not MISSING and item.default is not None and item.default is not False:
        text += f" (default: {item.default})"
    kind = _kind(hint)
    if item.metadata["positional"]:
        parser.add_argument(item.name, nargs="?", metavar=item.name.upper(), help=text)
    elif kind is bool:
        action = "store_true" if hint is bool else argparse.BooleanOptionalAction
        parser.add_argument(f"--{_dashed(item)}", action=action, default=None, help=text)
    elif typing.get_origin(kind) is list:
        parser.add_argument(
            f"--{_dashed(item)}", nargs="+", action="extend", metavar="NAME", help=text
        )
    else:
        metavar = "|".join(item.metadata["choices"]) or {int: "N", float: "X"}.get(kind, "TEXT")
        parser.add_argument(f"--{_dashed(item)}", metavar=metavar, help=text)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """``value``, from a flag (text) or YAML (text or typed), as the option's type.

    PyYAML reads 1e-4 as text, so numbers are accepted as text from both.
    """
    kind = _kind(hint)
    if value is None:
        if kind is hint:
            raise UserError(f"{name} must have a value")
        return None
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(i, str) and i for i in items):
            raise UserError(f"{name} must be a list of names, not {value!r}")
        return items
    if kind in (str, bool):
        if type(value) is not kind:
            what = "a text" if kind is str else "true or false"
            raise UserError(f"{name} must be {what}, not {value!r}")
        if value == "":
            raise UserError(f"{name} must not be empty")
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        number = kind(value)
        if number != float(value) and math.isfinite(float(value)):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} must be {what}, not {value!r}") from None


def _check(item: dataclasses.Field, value: Any, name: str) -> None:
    """Hold a value against its field's bounds and choices."""
    rules = item.metadata
    if value is None:
        return
    if rules["choices"] and value not in rules["choices"]:
        raise UserError(f"{name} must be one of {', '.join(rules['choices'])}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}")
    if rules["at_least"] is not None and value < rules["at_least"]:
        raise UserError(f"{name} must be at least {rules['at_least']}, not {value}")
    if rules["above"] is not None and value <= rules["above"]:
        raise UserError(f"{name} must be above {rules['above']:g}, not {value}")
    if rules["below"] is not None and value >= rules["below"]:
        raise UserError(f"{name} must be below {rules['below']:g}, not {value}")
    if rules["at_most"] is not None and value > rules["at_most"]:
        raise UserError(f"{name} must be at most {rules['at_most']:g}, not {value}")


def _read_yaml(path: Path, config_class: type, also_known: type | None) -> dict[str, Any]:
    """The options that a YAML file gives for ``config_class``."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"the configuration file {path} is not valid YAML{line}: "
            f"{getattr(error, 'problem', None) or error}"
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"the configuration file {path} must hold options as 'name: value' lines")
    own = {item.name for item in fields(config_class)}
    known = own | ({item.name for item in fields(also_known)} if also_known else set())
    values = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise UserError(
                f"{path} has an unknown option '{key}'; the nearest known is '{nearest}'"
            )
        if name in own:
            values[name] = value
    return values
