"""How ``--help`` presents options: the few that matter first; ``--help-all``: all, in groups."""

from __future__ import annotations

from collections.abc import Iterable

# Commands with no more options than this show all of them.
FEW = 14

FIRST = "the options that matter first"
OTHERS = "more"

# By the names of the options; the first group is what ``--help`` shows.
GROUPS: dict[str, tuple[str, ...]] = {
    FIRST: (
        "model", "data", "adapter_path", "rank", "learning_rate", "epochs", "iters", "batch_size",
        "max_seq_length", "resume", "rows", "json", "fit", "find_rate", "output", "sensitivities",
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
        "val_batches", "steps_per_report", "steps_per_eval", "early_stop", "test", "report_to",
        "project_name",
    ),
    "checkpoints": ("save_every", "keep_checkpoints"),
    "memory and trust": ("grad_checkpoint", "trust_remote_code", "allow_unexportable"),
}  # fmt: skip


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """A command's options in groups, in the groups' order; those in none are in ``OTHERS``."""
    left = list(names)
    if len(left) <= FEW:
        return {"options": left}
    found = {}
    for title, members in GROUPS.items():
        if own := [name for name in members if name in left]:
            found[title] = own
    known = {name for own in found.values() for name in own}
    if others := [name for name in left if name not in known]:
        found[OTHERS] = others
    return found
