"""A run directory as an adapter: made by ``train``, or from another tool's adapter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import adapter_delta
from tlora_mlx.adapters.format import AdapterFormat
from tlora_mlx.adapters.proof import Proof, cast_finite, prove_adapter
from tlora_mlx.errors import UserError
from tlora_mlx.invocation import suggested
from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.method.layers import adapter_faults
from tlora_mlx.runs.padded import PADDED, Unpadded, lora_parameters, padded
from tlora_mlx.runs.run_directory import ADAPTERS, CONFIG, PLAN
from tlora_mlx.storage.files import Finish, new_directory, read_json, user_path, write_json
from tlora_mlx.storage.foreign import file_in
from tlora_mlx.storage.safetensors import TensorFile, write_tensors
from tlora_mlx.version import __version__


class RunFormat(AdapterFormat):
    """A run directory."""

    name = "tlora"
    title = "run of tlora_mlx.train"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Check the type of fine-tuning."""
        return config.get("fine_tune_type") == "tlora"

    def read(self, directory: Path, config: Mapping[str, Any]) -> Adapter:
        """Read the run; its tensors are read from the file on demand."""
        path = directory / CONFIG
        missing = [key for key in ("model", "model_type") if not isinstance(config.get(key), str)]
        if missing:
            raise UserError(f"{path} has no {' and no '.join(map(repr, missing))}")
        if not isinstance(config.get("base_model"), (str, type(None))):
            raise UserError(f"'base_model' in {path} is not a name")
        if type(config.get("num_layers", -1)) is not int:
            raise UserError(f"'num_layers' in {path} is not a whole number")
        try:
            plan = RankPlan.from_dict(read_json(file_in(directory, PLAN), "the run's rank plan"))
        except ValueError as error:
            raise UserError(f"the rank plan {directory / PLAN} is invalid: {error}") from None
        file = TensorFile(file_in(directory, ADAPTERS), "the run's adapter")
        is_padded = PADDED.items() <= file.metadata.items()
        tensors = Unpadded(plan, file) if is_padded else file
        shapes = {name: (m.out_features, m.in_features) for name, m in plan.modules.items()}
        faults = adapter_faults(plan, tensors, shapes)
        faults += [
            f"{name}.lora_b is missing"
            for name in plan.adapted()
            if f"{name}.lora_b" not in tensors
        ]
        if faults:
            raise UserError(
                f"the adapter {directory / ADAPTERS} does not fit its plan: {'; '.join(faults)}"
            )
        return Adapter(
            plan,
            tensors,
            self.name,
            directory,
            config,
            model=config["model"],
            original=config.get("base_model"),
            model_type=config["model_type"],
        )

    def write(
        self,
        adapter: Adapter,
        output: Path,
        dtype: str = "float32",
        base_model: str | None = None,
        *,
        finish: Finish | None = None,
    ) -> Proof:
        """Write a run directory without metrics and checkpoints, which every command can read."""
        tensors = cast_finite(padded(adapter.plan, adapter.tensors), dtype)
        config = {
            "versions": {"tlora_mlx": __version__},
            **adapter.config,
            "fine_tune_type": self.name,
            "model": adapter.model,
            "base_model": base_model or adapter.original,
            "model_type": adapter.model_type,
            "num_layers": adapter.config.get("num_layers", -1),
            "lora_parameters": lora_parameters(adapter.plan),
        }
        with new_directory(output, finish) as staging:
            write_json(staging / PLAN, adapter.plan.to_dict())
            write_tensors(staging / ADAPTERS, tensors, PADDED)
            write_json(staging / CONFIG, config)
            return prove_adapter(adapter, partial(adapter_delta, read_run(staging)), dtype, output)


RUN = RunFormat()


def read_run(path: str | Path) -> Adapter:
    """Read a run directory without its base model.

    Args:
        path: a directory from ``train`` or ``export_run``.

    Returns:
        The run; its tensors are read from the file on demand.

    Raises:
        UserError: it is not a run directory, or a file is missing, damaged or does not fit the
            plan; all tensors at fault are named.
    """
    path = user_path(path)
    if not path.is_dir():
        raise UserError(f"run directory {path} does not exist")
    config = read_json(file_in(path, CONFIG), "the run's configuration")
    if not isinstance(config, dict) or not RUN.recognises(config):
        made = suggested("export", path, "--format", "run")
        raise UserError(
            f"{path} is not a run of tlora_mlx.train: its {CONFIG} is another tool's; if it is an "
            f"adapter, this makes a run of it: {made}"
        )
    return RUN.read(path, config)
