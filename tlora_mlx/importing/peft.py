"""A LoRA adapter of PEFT: what its configuration says of each pair of matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tlora_mlx.errors import UserError
from tlora_mlx.files import read_tensors
from tlora_mlx.importing.adapter import Adapter, is_number, plan_of

TENSORS = "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# Options under which an adapter is more than scale · B A, or sits on more than linear layers
# (huggingface/peft, tuners/lora/config.py).
MORE_THAN_LORA = (
    "use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices",
    "layer_replication", "alora_invocation_tokens", "monteclora_config", "use_bdlora",
    "arrow_config", "kasa_config",
)  # fmt: skip
# Initialisations that change the base's weights, which the file does not hold (…/lora/layer.py).
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_peft(path: Path, config: dict[str, Any]) -> Adapter:
    """Read a PEFT adapter directory whose ``adapter_config.json`` is ``config``.

    ``fan_in_fan_out`` needs no care: it tells how the base keeps W, and A and B are as ever.

    Raises:
        UserError: it is no plain LoRA of linear layers, its file is pickle, missing or damaged, or
            its tensors are not those that PEFT would expect by its ranks and patterns.
    """
    _refuse_more_than_lora(path, config)
    if not (path / TENSORS).exists() and (path / "adapter_model.bin").exists():
        raise UserError(
            f"the PEFT adapter {path} is a pickle file, adapter_model.bin, which can run code; "
            "load it with PEFT where you trust it, and save it with save_pretrained"
        )
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)  # PEFT's defaults
    if type(rank) is not int or rank < 1 or not is_number(alpha):
        raise UserError(f"the PEFT adapter {path} has no 'r' and 'lora_alpha' above 0")
    ranks = _Patterns(path, config, "rank_pattern", lambda value: type(value) is int and value > 0)
    alphas = _Patterns(path, config, "alpha_pattern", is_number)
    tensors, unknown = {}, []
    for key, value in read_tensors(path / TENSORS, "the PEFT adapter").items():
        if found := TENSOR.fullmatch(key):
            tensors[f"{found[1]}.lora_{found[2].lower()}"] = value.T
        else:
            unknown.append(key)
    if unknown:
        raise UserError(
            f"the PEFT adapter {path / TENSORS} has tensors that are no LoRA of a linear layer: "
            f"{', '.join(sorted(unknown))}"
        )

    parameters = config.get("target_parameters") or []

    def target(module: str) -> str:
        """What PEFT matches patterns with: for a weight that is targeted itself, its name."""
        weight = f"{module}.weight"
        return weight if any(f".{weight}".endswith(f".{p}") for p in parameters) else module

    def scale_of(module: str, of_tensor: int) -> float:
        over = math.sqrt(of_tensor) if config.get("use_rslora") else of_tensor
        return alphas.of(target(module), alpha) / over

    plan = plan_of(path / TENSORS, tensors, rank, alpha, scale_of)
    differing = [
        f"{name} has rank {module.rank}, and {expected} by the configuration"
        for name, module in plan.modules.items()
        if module.rank != (expected := ranks.of(target(name), rank))
    ]
    if differing:
        raise UserError(f"the PEFT adapter {path} does not fit itself: {'; '.join(differing)}")
    base = config.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    return Adapter(path, "peft", config, base, plan, tensors)


def _refuse_more_than_lora(path: Path, config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise UserError(f"{path} is a PEFT adapter of type {config['peft_type']}, not LORA")
    used = [key for key in MORE_THAN_LORA if config.get(key)]
    if (bias := config.get("bias", "none")) != "none":
        used.append(f"bias {bias}")
    # A linear layer's weight targeted as a parameter is that layer; stacks of experts are none.
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(str(p).endswith(".weight") for p in parameters):
        used.append("target_parameters that are no linear layer's weight")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        used.append(
            f"init_lora_weights {start} (PEFT's save_pretrained makes plain LoRA of it with "
            "path_initial_model_for_weight_conversion)"
        )
    if used:
        raise UserError(
            f"the PEFT adapter {path} is more than LoRA matrices on linear layers, which is all "
            f"that can be taken over: it uses {', '.join(used)}"
        )


class _Patterns:
    """A table of regular expressions, each with the value of the modules that it matches.

    A pattern matches a module's whole name, or its end after a dot; the first that matches counts.

    Source: huggingface/peft, ``utils/other.py::get_pattern_key``.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], key: str, is_right: Callable[[Any], bool]
    ):
        table = config.get(key) or {}
        if not isinstance(table, dict) or not all(map(is_right, table.values())):
            raise UserError(
                f"the PEFT adapter {path} has a '{key}' that is no table of numbers above 0"
            )
        self._values = []
        for pattern, value in table.items():
            try:
                self._values.append((re.compile(rf"(.*\.)?({pattern})$"), value))
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(
                    f"the PEFT adapter {path} has '{pattern}' in its '{key}', which is no regular "
                    f"expression: {error}"
                ) from None

    def of(self, module: str, default: Any) -> Any:
        return next((value for regex, value in self._values if regex.match(module)), default)
