"""TLoRA (task-aware LoRA, ACL 2026) for Apple Silicon on MLX, with an exporter to PEFT.

The public names below are imported when they are first used, so that the package itself, and with
it every command's ``--help``, loads at once.
"""

from importlib import import_module
from typing import Any

from tlora_mlx.version import __version__

_HOME = {
    "RunError": "errors",
    "UserError": "errors",
    "TrainConfig": "config",
    "load_run": "run_directory",
    "read_run": "run_directory",
    "calibrate": "method.calibration",
    "Calibration": "method.calibration",
    "plan_ranks": "method.allocation",
    "RankPlan": "method.allocation",
    "task_subspace": "method.subspace",
    "target_linears": "method.layers",
    "attach": "method.layers",
    "TLoRALinear": "method.layers",
    "export_peft": "exporting.peft",
    "push": "exporting.hub",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tlora_mlx' has no attribute {name!r}")
    return getattr(import_module(f"tlora_mlx.{_HOME[name]}"), name)
