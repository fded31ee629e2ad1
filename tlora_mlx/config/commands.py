"""The configuration of each command, for what concerns all of them: completion, documents."""

from __future__ import annotations

from tlora_mlx.config.check_options import CheckCommand
from tlora_mlx.config.export_options import ExportCommand, UploadCommand
from tlora_mlx.config.option import Config
from tlora_mlx.config.training_options import PlanCommand, TrainConfig
from tlora_mlx.config.usage_options import (
    ChatCommand,
    CompletionCommand,
    EvaluateCommand,
    GenerateCommand,
    InspectCommand,
    ReportCommand,
    ServeCommand,
)

OPTIONS_OF: dict[str, type[Config]] = {
    "check": CheckCommand,
    "train": TrainConfig,
    "plan": PlanCommand,
    "export": ExportCommand,
    "inspect": InspectCommand,
    "upload": UploadCommand,
    "generate": GenerateCommand,
    "chat": ChatCommand,
    "serve": ServeCommand,
    "evaluate": EvaluateCommand,
    "report": ReportCommand,
    "completion": CompletionCommand,
}

# Options whose values are paths, which a shell completes.
PATHS = {
    "config", "model", "data", "adapter_path", "plan", "from_adapter", "run", "path", "directory",
    "output", "sensitivities", "base_model", "json", "adapter", "resume_adapter_file",
    "sample_prompts", "merged",
}  # fmt: skip
