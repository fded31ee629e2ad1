"""mlx-lm's options, translated: one line says how; what has no counterpart is one error.

Source: ml-explore/mlx-lm d78bf58: ``mlx_lm/lora.py`` (the options and their defaults),
``mlx_lm/tuner/utils.py`` (``build_schedule``, ``linear_to_lora_layers``) and
``mlx_lm/tuner/datasets.py`` (``load_custom_hf_dataset``, ``create_dataset``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlora_mlx.errors import UserError, shown

# Options of mlx-lm that this package does not have under the same name.
ONLY_MLX_LM = (
    "train", "fine_tune_type", "optimizer_config", "resume_adapter_file", "test_batches",
    "clear_cache_threshold", "lora_parameters", "hf_dataset", "prompt_feature",
    "completion_feature", "chat_feature", "text_feature", "wandb",
)  # fmt: skip
# Those of them that are flags of ``mlx_lm.lora``, with argparse's arguments.
MLX_LM_FLAGS: dict[str, dict[str, Any]] = {
    "train": {"action": "store_true", "default": None},
    "fine_tune_type": {},
    "resume_adapter_file": {},
    "test_batches": {},
    "clear_cache_threshold": {},
    "wandb": {},  # in LORA.md, and in the parser until October 2025
}
# Options of the same name that may be null there, which means the default.
_MAY_BE_NULL = (
    "model", "data", "optimizer", "mask_prompt", "num_layers", "batch_size", "iters", "val_batches",
    "learning_rate", "steps_per_report", "steps_per_eval", "grad_accumulation_steps",
    "adapter_path", "save_every", "test", "max_seq_length", "grad_checkpoint", "report_to",
    "project_name", "seed", "trust_remote_code", "lr_schedule",
)  # fmt: skip
# What mlx-lm counts in batches and this package in updates.
_COUNTED_IN_BATCHES = ("iters", "steps_per_report", "steps_per_eval", "save_every")
_FEATURES = {
    "prompt_feature": "prompt_column",
    "completion_feature": "completion_column",
    "chat_feature": "messages_column",
    "text_feature": "text_column",
}
_ITERS = 1000
_OPTIMIZERS = ("adam", "adamw")
_SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}


def command_line(arguments: Sequence[str]) -> list[str] | None:
    """The command, and its arguments, that ``mlx_lm.lora`` with these arguments is here.

    ``train``, or ``evaluate`` if they only test; None if they are not those of ``mlx_lm.lora``.
    """
    if not {"--train", "--test", "-c", "--config"} & {*arguments}:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--train", "--test"):
        parser.add_argument(name, action="store_true")
    for name in ("--config", "--model", "--data", "--adapter-path", "--test-batches"):
        parser.add_argument(name, *(["-c"] if name == "--config" else []), nargs="?")
    given, others = parser.parse_known_args(arguments)
    if given.train or given.config:
        return ["train", *arguments]
    named = {"--data": given.data, "--base-model": given.model}
    flags = [part for name, value in named.items() if value for part in (name, value)]
    run = given.adapter_path or "adapters"
    return ["evaluate", run, "--task", "perplexity", *flags, *others]


class Translation:
    """Options with mlx-lm's names, translated.

    Args:
        options: the contents of a YAML file and, where they are only mlx-lm's, of flags.
        flags: options of this package that were given as flags, which win.

    Attributes:
        values: the options by this package's names, without the flags.

    Raises:
        UserError: something has no counterpart (all of it is named), or a value is not of its kind.
    """

    def __init__(self, options: Mapping[str, Any], flags: Mapping[str, Any]):
        null = {k for k, v in options.items() if v is None and k in (*ONLY_MLX_LM, *_MAY_BE_NULL)}
        self._given = {name: value for name, value in options.items() if name not in null}
        self.values = {k: v for k, v in self._given.items() if k not in ONLY_MLX_LM}
        self._flags = flags
        self._translated: list[str] = []
        self._ignored: list[str] = []
        self._refused: list[str] = []
        schedule = self.values.get("lr_schedule")
        self._is_mlx_lm = bool(self._given.keys() & {*ONLY_MLX_LM}) or isinstance(schedule, Mapping)
        if self._is_mlx_lm:
            self._translate()

    def line(self) -> str:
        """What was translated and what was ignored, in one line; empty if nothing was."""
        parts = [("translated: ", self._translated), ("ignored: ", self._ignored)]
        told = [head + ", ".join(found) for head, found in parts if found]
        return f"mlx-lm's options, {'; '.join(told)}" if told else ""

    def _translate(self) -> None:
        self._kind()
        self._optimizer()
        self._lora_parameters()
        self._schedule()
        self._adapter()
        self._data()
        self._counts()
        if self._refused:
            raise UserError(
                f"mlx-lm's options ask for what tlora does not have: {'; '.join(self._refused)}; "
                "leave them out, or train with mlx_lm.lora"
            )

    def _kind(self) -> None:
        given = self._given
        if given.get("train", True) is not True:
            self._refused.append(
                "train: false (tlora evaluate RUN --task perplexity --data FILE gives the loss on "
                "test data)"
            )
        kind = given.get("fine_tune_type", "lora")
        if kind != "lora":
            self._refused.append(f"fine_tune_type: {kind}")
        if "test_batches" in given:
            self._ignored.append("test_batches (all test data is used)")
        if "wandb" in given:
            self._set("report_to", "wandb", "wandb")
            self._set("project_name", given["wandb"], "wandb")
        if "clear_cache_threshold" in given:
            self._ignored.append("clear_cache_threshold (the cache is always bounded)")

    def _optimizer(self) -> None:
        name = self.values.get("optimizer", "adamw")
        if name not in _OPTIMIZERS and "optimizer" not in self._flags:
            self._refused.append(f"optimizer: {name}")
        config = self._mapping("optimizer_config")
        own = config.get(name) or {}
        if not isinstance(own, Mapping):
            raise UserError(f"optimizer_config.{name} must be a mapping, not {shown(own)}")
        for key, value in own.items():
            if key == "weight_decay":
                self._set("weight_decay", value, f"optimizer_config.{name}.weight_decay")
            elif key == "bias_correction":
                if value is not True:
                    self._ignored.append("bias_correction (it is always on)")
            elif key in ("betas", "eps"):
                self._ignored.append(f"{key} ({'0.9, 0.999' if key == 'betas' else '1e-8'})")
            else:
                self._refused.append(f"optimizer_config.{name}.{key}")

    def _lora_parameters(self) -> None:
        parameters = {k: v for k, v in self._mapping("lora_parameters").items() if v is not None}
        if parameters and "resume_adapter_file" in self._given:
            self._ignored.append("lora_parameters (they are the adapter's)")
            self._ignored += ["num_layers"] if self.values.pop("num_layers", None) else []
            return
        rank = self._number(parameters.pop("rank", 8), "lora_parameters.rank")
        if "lora_parameters" in self._given:
            self._set("rank", int(rank) if rank == int(rank) else rank, "lora_parameters.rank")
        if "scale" in parameters:
            scale = self._number(parameters.pop("scale"), "lora_parameters.scale")
            name = f"lora_parameters.scale {scale:g}"
            self._set("alpha", scale * self._number(self._flags.get("rank", rank), "--rank"), name)
        if keys := parameters.pop("keys", None):
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise UserError(f"lora_parameters.keys must be a list of names, not {shown(keys)}")
            names = list(dict.fromkeys(key.rsplit(".", 1)[-1] for key in keys))
            self._set("target_modules", names, "lora_parameters.keys")
        if self._number(parameters.pop("dropout", 0.0), "lora_parameters.dropout"):
            self._refused.append("lora_parameters.dropout")
        self._refused += [f"lora_parameters.{key}" for key in parameters]

    def _schedule(self) -> None:
        schedule = self.values.get("lr_schedule")
        if not isinstance(schedule, Mapping):
            return
        del self.values["lr_schedule"]
        name, arguments = schedule.get("name"), schedule.get("arguments")
        if name not in _SCHEDULES:
            self._refused.append(f"lr_schedule: {name}")
            return
        if not isinstance(arguments, list) or not arguments:
            raise UserError(
                f"lr_schedule.arguments must be a list of numbers, not {shown(arguments)}"
            )
        rate = self._number(arguments[0], "lr_schedule.arguments")
        self.values["learning_rate"] = rate
        self.values["lr_schedule"] = _SCHEDULES[name]
        # join_schedules counts updates, of which there is one every so many batches.
        updates = self._number(self._flags.get("iters", self._updates("iters", _ITERS)), "iters")
        warmup = self._number(schedule.get("warmup") or 0, "lr_schedule.warmup")
        self.values["warmup"] = min(warmup / max(updates, 1), 1.0)
        self._translated.append(
            f"lr_schedule {name} → --learning-rate {rate:g} --lr-schedule {_SCHEDULES[name]} "
            f"--warmup {self.values['warmup']:.3g}"
        )
        if len(arguments) > 1:
            self._ignored.append("the schedule's own end (it falls to 0 over all updates)")
        if schedule.get("warmup_init"):
            self._ignored.append("warmup_init")

    def _adapter(self) -> None:
        path = self._given.get("resume_adapter_file")
        if path is None:
            return
        if not isinstance(path, str):
            raise UserError(f"resume_adapter_file must be a path, not {shown(path)}")
        whole = Path(path).name == "adapters.safetensors"
        self._set("from_adapter", str(Path(path).parent) if whole else path, "resume_adapter_file")

    def _data(self) -> None:
        found = self._given.get("hf_dataset")
        if found is not None:
            entries = found if isinstance(found, list) else [found]
            self.values["data"] = [_hub_source(i, entry) for i, entry in enumerate(entries, 1)]
            if "data" not in self._flags:
                self._translated.append("hf_dataset → data")
            return
        for feature, column in _FEATURES.items():
            if feature in self._given:
                self._set(column, self._given[feature], feature)
        for one, other in (("prompt", "completion"), ("completion", "prompt")):
            if f"{one}_feature" in self._given:
                self.values.setdefault(f"{other}_column", other)

    def _counts(self) -> None:
        """mlx-lm counts batches; an update takes ``grad_accumulation_steps`` of them."""
        for name in _COUNTED_IN_BATCHES:
            if name in self.values and self._updates(name) != self.values[name]:
                before, self.values[name] = self.values[name], self._updates(name)
                self._translated.append(f"{name} {before} batches → {self.values[name]} updates")

    def _updates(self, name: str, default: int | None = None) -> Any:
        """How many updates so many batches are; as it is if it is not a number."""
        value, steps = self.values.get(name, default), self.values.get("grad_accumulation_steps", 1)
        if type(value) is not int or type(steps) is not int or steps < 2:
            return value
        return math.ceil(value / steps)

    def _set(self, name: str, value: Any, source: str) -> None:
        """Set an option and tell it, unless a flag will win."""
        self.values[name] = value
        if name not in self._flags:
            shown = " ".join(value) if isinstance(value, list) else value
            self._translated.append(f"{source} → --{name.replace('_', '-')} {shown}")

    def _mapping(self, name: str) -> Mapping[str, Any]:
        value = self._given.get(name, {})
        if not isinstance(value, Mapping):
            raise UserError(f"{name} must be a mapping, not {shown(value)}")
        return value

    def _number(self, value: Any, name: str) -> float:
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError):
            raise UserError(f"{name} must be a number, not {shown(value)}") from None


def _hub_source(number: int, entry: Any) -> dict[str, Any]:
    """One entry of ``hf_dataset`` as an entry of ``data``, with mlx-lm's default splits."""
    where = f"entry {number} of 'hf_dataset'"
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} is not a mapping with 'path'")
    made = {_FEATURES.get(key, key): value for key, value in entry.items() if value is not None}
    name = made.pop("name", None)  # what mlx-lm called the path before
    made.setdefault("path", name)
    for one, other in (("prompt", "completion"), ("completion", "prompt")):
        if f"{one}_column" in made:
            made.setdefault(f"{other}_column", other)
    return {"train_split": "train[:80%]", "valid_split": "train[-10%:]", **made}
