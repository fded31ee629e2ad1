"""mlx-lm's adapters: one rank and one scale for all modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tlora_mlx.adapters.adapter import Adapter, is_number, is_rank, plan_of
from tlora_mlx.adapters.delta import Delta, float32
from tlora_mlx.adapters.format import CONFIG, AdapterFormat
from tlora_mlx.adapters.proof import Proof, cast_finite, prove_adapter
from tlora_mlx.errors import UserError
from tlora_mlx.method.experts import stack_and_number
from tlora_mlx.runs.padded import lora_parameters, padded
from tlora_mlx.storage.files import Finish, new_directory, read_json, write_json
from tlora_mlx.storage.foreign import file_in
from tlora_mlx.storage.safetensors import TensorFile, read_tensors, write_tensors

ADAPTERS = "adapters.safetensors"


class MlxLmFormat(AdapterFormat):
    """An adapter directory for mlx-lm's ``--adapter-path``, in the form of ``runs.padded``."""

    name = "mlx-lm"
    title = "mlx-lm adapter"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Check for the keys that mlx-lm's trainer writes."""
        return "lora_parameters" in config or "fine_tune_type" in config

    def read(self, directory: Path, config: Mapping[str, Any], weights: str = ADAPTERS) -> Adapter:
        """Read a LoRA adapter whose tensors match its configuration; not DoRA, not experts.

        Args:
            directory: where it is.
            config: its ``adapter_config.json``.
            weights: the file that holds its tensors.
        """
        kind = config.get("fine_tune_type", "lora")
        if kind != "lora":
            raise UserError(
                f"the mlx-lm adapter {directory} is of type {kind}; only lora is supported"
            )
        parameters = config.get("lora_parameters")
        parameters = parameters if isinstance(parameters, dict) else {}
        rank, scale = parameters.get("rank"), parameters.get("scale")
        if not is_rank(rank) or not is_number(scale):
            raise UserError(
                f"the mlx-lm adapter {directory} has no 'lora_parameters' with 'rank' and 'scale' "
                "above 0"
            )
        path = file_in(directory, weights)
        tensors = read_tensors(path, "the mlx-lm adapter")
        unknown = [key for key in tensors if not key.endswith((".lora_a", ".lora_b"))]
        if unknown:
            raise UserError(
                f"the mlx-lm adapter {path} has tensors that are not LoRA matrices of a linear "
                f"layer: {', '.join(sorted(unknown))}"
            )
        stacks = sorted({key.rpartition(".")[0] for key, t in tensors.items() if t.ndim == 3})
        if stacks:
            raise UserError(
                f"the mlx-lm adapter {directory} adapts stacks of experts, which is not "
                f"supported: {', '.join(stacks)}"
            )
        plan = plan_of(path, tensors, rank, rank * scale, lambda name, of_tensor: scale)
        differing = [f"{name} has {m.rank}" for name, m in plan.modules.items() if m.rank != rank]
        if differing:
            raise UserError(
                f"the mlx-lm adapter {directory} is inconsistent: its configuration has rank "
                f"{rank}, but {', '.join(differing)}"
            )
        model = config.get("model")
        model = model if isinstance(model, str) else None
        return Adapter(plan, tensors, self.name, directory, config, model=model)

    def write(
        self,
        adapter: Adapter,
        output: Path,
        dtype: str = "float32",
        base_model: str | None = None,
        *,
        finish: Finish | None = None,
    ) -> Proof:
        """Write an adapter for mlx-lm's own ``generate``, ``server`` and ``fuse``, padded."""
        adapter.adapted()
        tensors = cast_finite(padded(adapter.plan, adapter.tensors), dtype)
        config = {
            "fine_tune_type": "lora",
            "model": base_model or adapter.model,
            "num_layers": adapter.config.get("num_layers", -1),
            "lora_parameters": lora_parameters(adapter.plan),
        }
        with new_directory(output, finish) as staging:
            write_tensors(staging / ADAPTERS, tensors, {"format": "mlx"})
            write_json(staging / CONFIG, config)
            return _prove(adapter, staging, dtype, output)


MLX_LM = MlxLmFormat()


def _expert(tensors: TensorFile, key: str, number: int) -> np.ndarray:
    """One expert's matrix from a stack (experts, rows, columns)."""
    rows = tensors.entries[key].shape[1]
    return float32(tensors.rows(key, number * rows, (number + 1) * rows))


def _prove(adapter: Adapter, path: Path, dtype: str, output: Path) -> Proof:
    """Read the adapter back as mlx-lm does: scale · B A with one scale and rank."""
    parameters = read_json(path / CONFIG, "the adapter's configuration")["lora_parameters"]
    rank, scale = parameters["rank"], parameters["scale"]
    tensors = TensorFile(path / ADAPTERS, "the adapter")

    def delta(name: str) -> Delta | None:
        name, number = stack_and_number(name)
        keys = f"{name}.lora_a", f"{name}.lora_b"
        if not set(keys) <= tensors.keys():
            return None
        if number is None:
            a, b = (float32(tensors[key]).T for key in keys)
        else:
            a, b = (_expert(tensors, key, number) for key in keys)
        return Delta(scale * b, a) if len(a) == rank else None

    return prove_adapter(adapter, delta, dtype, output)
