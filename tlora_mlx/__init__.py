"""TLoRA (task-aware LoRA, ACL 2026) for Apple Silicon on MLX, with an exporter to PEFT.

The public names below are imported on first use, so that the package itself, and with it every
command's ``--help``, loads instantly. Editors and type checkers read the imports.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tlora_mlx.version import __version__ as __version__

if TYPE_CHECKING:
    from tlora_mlx.adapters.adapter import Adapter as Adapter
    from tlora_mlx.adapters.combine import Combination as Combination
    from tlora_mlx.adapters.combine import combine as combine
    from tlora_mlx.adapters.exporting import export_gguf_adapter as export_gguf_adapter
    from tlora_mlx.adapters.exporting import export_mlx_lm as export_mlx_lm
    from tlora_mlx.adapters.exporting import export_peft as export_peft
    from tlora_mlx.adapters.exporting import export_run as export_run
    from tlora_mlx.adapters.loading import load_adapter as load_adapter
    from tlora_mlx.adapters.proof import Proof as Proof
    from tlora_mlx.adapters.registry import read_adapter as read_adapter
    from tlora_mlx.adapters.registry import resolve_adapter as resolve_adapter
    from tlora_mlx.adapters.run import read_run as read_run
    from tlora_mlx.api import check as check
    from tlora_mlx.api import evaluate as evaluate
    from tlora_mlx.api import export as export
    from tlora_mlx.api import plan as plan
    from tlora_mlx.api import report as report
    from tlora_mlx.api import train as train
    from tlora_mlx.config.check_options import CheckCommand as CheckCommand
    from tlora_mlx.config.export_options import ExportCommand as ExportCommand
    from tlora_mlx.config.training_options import PlanCommand as PlanCommand
    from tlora_mlx.config.training_options import TrainConfig as TrainConfig
    from tlora_mlx.config.usage_options import EvaluateCommand as EvaluateCommand
    from tlora_mlx.config.usage_options import ReportCommand as ReportCommand
    from tlora_mlx.errors import Interrupted as Interrupted
    from tlora_mlx.errors import RunError as RunError
    from tlora_mlx.errors import UserError as UserError
    from tlora_mlx.evaluation.evaluate import EvaluationResult as EvaluationResult
    from tlora_mlx.merging.dense import export_merged as export_merged
    from tlora_mlx.merging.dequantize import export_dequantized as export_dequantized
    from tlora_mlx.merging.gguf_model import export_gguf as export_gguf
    from tlora_mlx.merging.requantize import export_requantized as export_requantized
    from tlora_mlx.merging.task import AdaptedTask as AdaptedTask
    from tlora_mlx.merging.task import read_task as read_task
    from tlora_mlx.method.allocation import ModulePlan as ModulePlan
    from tlora_mlx.method.allocation import RankPlan as RankPlan
    from tlora_mlx.method.allocation import plan_ranks as plan_ranks
    from tlora_mlx.method.calibration import Calibration as Calibration
    from tlora_mlx.method.calibration import calibrate as calibrate
    from tlora_mlx.method.layers import TLoRALinear as TLoRALinear
    from tlora_mlx.method.layers import attach as attach
    from tlora_mlx.method.layers import target_linears as target_linears
    from tlora_mlx.method.subspace import task_subspace as task_subspace
    from tlora_mlx.models.base_model import BaseModel as BaseModel
    from tlora_mlx.models.base_model import load_base_model as load_base_model
    from tlora_mlx.observer import Observer as Observer
    from tlora_mlx.publishing.export import ExportResult as ExportResult
    from tlora_mlx.publishing.hub import push as push
    from tlora_mlx.terminal import Terminal as Terminal
    from tlora_mlx.training.session import TrainingResult as TrainingResult

# The module that defines each name; a test compares it with the imports above.
_MODULES = {
    "adapters.adapter": ("Adapter",),
    "adapters.combine": ("Combination", "combine"),
    "adapters.exporting": ("export_gguf_adapter", "export_mlx_lm", "export_peft", "export_run"),
    "adapters.registry": ("read_adapter", "resolve_adapter"),
    "adapters.loading": ("load_adapter",),
    "adapters.proof": ("Proof",),
    "adapters.run": ("read_run",),
    "api": ("check", "evaluate", "export", "plan", "report", "train"),
    "config.export_options": ("ExportCommand",),
    "config.check_options": ("CheckCommand",),
    "config.training_options": ("PlanCommand", "TrainConfig"),
    "config.usage_options": ("EvaluateCommand", "ReportCommand"),
    "errors": ("Interrupted", "RunError", "UserError"),
    "evaluation.evaluate": ("EvaluationResult",),
    "merging.dense": ("export_merged",),
    "merging.dequantize": ("export_dequantized",),
    "merging.gguf_model": ("export_gguf",),
    "merging.requantize": ("export_requantized",),
    "merging.task": ("AdaptedTask", "read_task"),
    "method.allocation": ("ModulePlan", "RankPlan", "plan_ranks"),
    "method.calibration": ("Calibration", "calibrate"),
    "method.layers": ("TLoRALinear", "attach", "target_linears"),
    "method.subspace": ("task_subspace",),
    "models.base_model": ("BaseModel", "load_base_model"),
    "observer": ("Observer",),
    "publishing.export": ("ExportResult",),
    "publishing.hub": ("push",),
    "terminal": ("Terminal",),
    "training.session": ("TrainingResult",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tlora_mlx' has no attribute {name!r}")
    return getattr(import_module(f"tlora_mlx.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Makes sure that ``tlora_mlx.train`` stays the function when the command is imported.

    Python binds a submodule to its package once it is loaded, and that would hide the function:
    https://docs.python.org/3/reference/import.html#submodules
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
