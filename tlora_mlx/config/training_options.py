"""The options of ``train`` and ``plan``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from tlora_mlx.config.data_options import DataConfig
from tlora_mlx.config.option import flag, option
from tlora_mlx.errors import UserError, shown


@dataclass(kw_only=True)
class PlanConfig(DataConfig):
    """The options for calibration and allocation."""

    rank: int = option(
        8,
        "base rank: N per module on average; more for the modules that the loss depends on most",
        at_least=1,
    )
    alpha: float | None = option(
        None,
        "base alpha: a module's scale is alpha / rank or more; default: the rank, as in the paper, "
        "so that scales start at 1 (mlx-lm: a scale of 20 for every module)",
        above=0.0,
    )
    max_rank: int | None = option(
        None,
        "highest rank of a module; what exceeds it goes to the others; default: no limit",
        at_least=1,
    )
    target_modules: list[str] | None = option(
        None,
        "names of the layers to adapt, such as q_proj v_proj; default: every linear layer in the "
        "transformer blocks",
    )
    target_experts: bool = option(
        False, "also adapt the experts of a mixture, each with its own rank"
    )
    num_layers: int = option(
        -1,
        "adapt only the last N transformer blocks; -1: all (mlx-lm: 16), since ranks go where they "
        "matter anyway",
        at_least=-1,
    )
    calibration_samples: int = option(
        64,
        "training samples to calibrate on, drawn with --seed; all if there are fewer",
        at_least=1,
    )
    batch_size: int = option(
        4, "samples per batch, over all processes of mlx.launch together", at_least=1
    )
    grad_checkpoint: bool = option(
        False, "recompute activations in the backward pass to save memory"
    )
    allow_unexportable: bool = option(
        False, "continue even if the model family or a module cannot be exported"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers == 0:
            raise UserError("--num-layers must be -1 (all) or at least 1, not 0")
        if self.alpha is None:
            self.alpha = float(self.rank)


@dataclass(kw_only=True)
class PlanCommand(PlanConfig):
    """``python -m tlora_mlx.plan``, and the configuration of ``tlora_mlx.plan``.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is not allowed for its option.
    """

    model: str | None = option(
        None, "the model: a directory, or a Hub repository that mlx-lm loads"
    )
    data: str | list[Any] | None = option(
        None, "the data: a directory with train.jsonl, a file, or a Hub data set, as for train"
    )
    sensitivities: str | None = option(
        None,
        "an earlier plan, whose sensitivities to allocate from again, with other values of --rank, "
        "--alpha and --max-rank; model and data are not needed",
    )
    output: str = option(
        "plan.json", "file for the plan; with matplotlib, a picture is put next to it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sensitivities is None and not (self.model and self.data):
            raise UserError("missing: --model and --data, or --sensitivities; see --help")


# The options that determine ranks, scales and A, unless an adapter provides them.
INITIALISATION_OPTIONS = {
    "rank",
    "alpha",
    "max_rank",
    "target_modules",
    "target_experts",
    "num_layers",
}
INITIALISATION_OPTIONS |= {"plan", "calibration_samples", "covariance", "calibration_memory"}


@dataclass(kw_only=True)
class TrainConfig(PlanConfig):
    """``python -m tlora_mlx.train``, and the configuration of ``tlora_mlx.train``.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is not allowed for its option.
    """

    adapter_path: str = option("adapters", "directory to create for the run")
    resume: bool = option(
        False,
        "resume the run in --adapter-path from its newest intact checkpoint, with the same result "
        "as if it had never stopped; its options need not be given again",
    )
    plan: str | None = option(
        None, "file with ranks and scales to use, which tlora plan wrote and you may have edited"
    )
    from_adapter: str | None = option(
        None,
        "adapter to start from (a run, or one of PEFT or mlx-lm) instead of calibrating: its "
        "ranks, scales and A stay, B is trained further",
    )
    covariance: str = option(
        "auto",
        "how the directions of A are found: exact keeps covariances (in × in), in as many passes "
        "over the calibration samples as --calibration-memory requires; streaming keeps a few "
        "matrices (in × (rank + 32)) per module and needs about 5 forward passes; auto: exact if "
        "one pass is enough",
        choices=("auto", "exact", "streaming"),
    )
    calibration_memory: float | None = option(
        None,
        "GB that covariances may take; default: a quarter of the memory that the machine "
        "recommends for the GPU",
        above=0.0,
    )
    iters: int = option(
        1000, "optimizer updates; each takes --grad-accumulation-steps batches", at_least=1
    )
    epochs: int | None = option(
        None, "train for N passes over the data, instead of --iters", at_least=1
    )
    optimizer: str = option(
        "adamw", "both have bias correction, unlike mlx-lm's adam", choices=("adam", "adamw")
    )
    learning_rate: float | Literal["auto"] = option(
        3e-4,
        "peak learning rate (mlx-lm: 1e-5, at scale 20; here scales start at 1); auto: find one by "
        "short runs before training, as tlora check --find-rate does",
        above=0.0,
        below=3e38,
    )
    lr_schedule: str = option(
        "cosine",
        "how the learning rate falls after the warm-up (constant: not at all); the paper uses "
        "cosine or linear, mlx-lm constant",
        choices=("cosine", "linear", "constant"),
    )
    warmup: float = option(
        0.03,
        "share of the updates during which the learning rate rises from 0, as in the paper",
        at_least=0.0,
        at_most=1.0,
    )
    weight_decay: float = option(0.0, "weight decay of adamw", at_least=0.0)
    grad_accumulation_steps: int = option(
        1, "batches per optimizer update, each weighted by its tokens", at_least=1
    )
    max_grad_norm: float = option(
        1.0,
        "scale larger gradients down to this norm, as transformers' trainer does; 0: never, as in "
        "mlx-lm",
        at_least=0.0,
    )
    skip_nonfinite: int = option(
        0,
        "skip up to N updates whose loss or gradient is not finite, instead of stopping",
        at_least=0,
    )
    val_batches: int = option(25, "batches per validation; -1: all", at_least=-1)
    steps_per_report: int = option(10, "updates between reports of the training loss", at_least=1)
    steps_per_eval: int = option(200, "updates between validations", at_least=1)
    early_stop: int | None = option(
        None,
        "stop after N consecutive validations without improvement; default: never",
        at_least=1,
    )
    save_every: int = option(100, "updates between checkpoints", at_least=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep", at_least=1)
    report_to: str | None = option(
        None,
        "also report to wandb or swanlab (both through mlx-lm), tensorboard or trackio, or to "
        "several: wandb,tensorboard; default: only metrics.jsonl",
    )
    project_name: str = option("tlora_mlx", "name of the project that --report-to reports to")
    sample_prompts: str | None = option(
        None,
        "text file with one prompt per line; the model answers them at each validation, for "
        "metrics.jsonl and the report",
    )
    test: bool = option(False, "report the loss on test.jsonl before and after training")

    def __post_init__(self) -> None:
        if self.from_adapter and not self.resume:
            self._refuse_with_adapter()
        super().__post_init__()
        if isinstance(self.learning_rate, str) and self.learning_rate != "auto":
            raise UserError(
                f"--learning-rate must be a number or auto, not {shown(self.learning_rate)}"
            )
        if self.val_batches == 0:
            raise UserError("--val-batches must be -1 (all) or at least 1, not 0")

    def _refuse_with_adapter(self) -> None:
        """An adapter that training starts from already has ranks, scales and A."""
        given = [
            flag(item.name)
            for item in fields(self)
            if item.name in INITIALISATION_OPTIONS
            and getattr(self, item.name) != item.default
            and not (item.name == "alpha" and self.alpha == self.rank)  # its default, filled in
        ]
        if given:
            raise UserError(
                f"{', '.join(given)} cannot be used with --from-adapter, which has its own ranks, "
                "scales and A; leave them out"
            )
