"""How ``--help`` presents options: the few that matter first; ``--help-all``: all, in groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Commands with no more options than this show all of them.
FEW = 14

FIRST = "the options that matter first"

# By the names of the options; the first group is what ``--help`` shows.
Groups = Mapping[str, tuple[str, ...]]
TRAINING: Groups = {
    FIRST: (
        "model", "data", "adapter_path", "rank", "learning_rate", "epochs", "iters", "batch_size",
        "max_seq_length", "resume", "output", "sensitivities",
    ),
    "data": (
        "format", "prompt_column", "completion_column", "messages_column", "text_column",
        "max_samples", "val_split", "mask_prompt", "seed",
    ),
    "ranks and calibration": (
        "alpha", "max_rank", "target_modules", "target_experts", "num_layers", "plan",
        "from_adapter", "calibration_samples", "covariance", "calibration_memory",
    ),
    "optimizer": (
        "optimizer", "lr_schedule", "warmup", "weight_decay", "grad_accumulation_steps",
        "max_grad_norm", "skip_nonfinite",
    ),
    "validation and reports": (
        "val_batches", "steps_per_report", "steps_per_eval", "early_stop", "test",
        "sample_prompts", "report_to", "project_name",
    ),
    "checkpoints": ("save_every", "keep_checkpoints"),
    "memory and permissions": ("grad_checkpoint", "trust_remote_code", "allow_unexportable"),
}  # fmt: skip
_WITHOUT_EFFECT_IN_CHECK = (
    "adapter_path", "resume", "steps_per_report", "early_stop", "skip_nonfinite", "sample_prompts",
    "report_to", "project_name", "save_every", "keep_checkpoints",
)  # fmt: skip
CHECK: Groups = {
    FIRST: ("model", "data", "max_seq_length", "rows", "json", "fit", "find_rate"),
    "the run that --fit and --find-rate try out": (
        "rank", "learning_rate", "epochs", "iters", "batch_size",
    ),
    **{
        title: tuple(name for name in names if name not in _WITHOUT_EFFECT_IN_CHECK)
        for title, names in TRAINING.items() if title != FIRST
    },
    "taken from train's command line, without effect here": _WITHOUT_EFFECT_IN_CHECK,
}  # fmt: skip
EXPORT: Groups = {
    FIRST: ("run", "format", "output", "base_model", "merged", "push_to"),
    "adapters": ("layout", "names", "dtype"),
    "merged models": (
        "outtype", "dequantize", "quantize", "rounding", "data", "bits", "target_bpw",
    ),
    "several adapters into one": (
        "adapter", "combine", "density", "svd_rank", "majority_sign_method", "seed",
    ),
    "the Hub": ("private",),
}  # fmt: skip


def grouped(names: Iterable[str], groups: Groups) -> dict[str, list[str]]:
    """A command's options, each in one of the groups; in a single one if they are few."""
    own = list(names)
    if len(own) <= FEW:
        return {"options": own}
    found = {title: [n for n in members if n in own] for title, members in groups.items()}
    return {title: members for title, members in found.items() if members}
