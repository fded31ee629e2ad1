"""The options of ``train`` and ``plan``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

from tlora_mlx.config.option import Config, flag, option
from tlora_mlx.data.formats import FORMATS
from tlora_mlx.errors import UserError


@dataclass(kw_only=True)
class DataConfig(Config):
    """Which data is read, and how it is tokenized."""

    model: str = option(MISSING, "model directory, or a Hub repository that mlx-lm loads")
    data: str = option(
        MISSING,
        "directory with train.jsonl (and valid.jsonl, test.jsonl) in mlx-lm's formats, or a Hub "
        "data set, as NAME or NAME:CONFIGURATION",
    )
    format: str | None = option(
        None,
        "how rows of a well-known data set become prompt and completion; not needed where they "
        "have mlx-lm's keys",
        choices=tuple(FORMATS),
    )
    prompt_column: str | None = option(
        None, "name of the rows' column that is the prompt, where it is not 'prompt'"
    )
    completion_column: str | None = option(
        None, "name of the rows' column that is the completion, where it is not 'completion'"
    )
    messages_column: str | None = option(
        None, "name of the rows' column that holds the messages, where it is not 'messages'"
    )
    max_samples: int | None = option(
        None, "only the first so many rows of the training data", at_least=1
    )
    val_split: float | None = option(
        None,
        "share of the training rows to validate on, drawn by --seed, where the data has no "
        "validation split",
        above=0.0,
        below=1.0,
    )
    max_seq_length: int = option(2048, "longer samples are cut to so many tokens", at_least=2)
    mask_prompt: bool | None = option(
        None,
        "leave the prompt out of the loss; default: yes where the data has prompts, as in the "
        "paper (mlx-lm: no)",
    )
    seed: int = option(0, "seed of sampling and data order", at_least=0)
    trust_remote_code: bool = option(False, "let the model's repository run its own code")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt_column is None) != (self.completion_column is None):
            raise UserError("--prompt-column and --completion-column must be given together")

    def columns(self) -> dict[str, str]:
        """``prompt``, ``completion`` and ``messages`` by the column that is named for each."""
        names = ("prompt", "completion", "messages")
        given = {getattr(self, f"{name}_column"): name for name in names}
        return {column: name for column, name in given.items() if column is not None}


@dataclass(kw_only=True)
class CheckCommand(DataConfig):
    """``python -m tlora_mlx.check``, and what ``tlora_mlx.check`` takes.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is outside of what its option allows.
    """

    rows: int = option(3, "how many samples of the training data to show", at_least=0)
    json: str | None = option(
        None, "file to write all samples to, as JSON lines: split, row, tokens, counts, text"
    )


@dataclass(kw_only=True)
class PlanConfig(DataConfig):
    """What calibration and allocation need."""

    rank: int = option(
        8,
        "base rank: the budget is this times the number of target modules, spread by sensitivity",
        at_least=1,
    )
    alpha: float | None = option(
        None,
        "base alpha: a module's scale is at least alpha / rank; default: the rank, as in the "
        "paper (scales from 1 up; mlx-lm's one scale is 20)",
        above=0.0,
    )
    max_rank: int | None = option(
        None, "no module gets a higher rank; what is cut off goes to the others", at_least=1
    )
    target_modules: list[str] | None = option(
        None,
        "last name components of the layers to adapt, such as q_proj v_proj; default: every linear "
        "layer in the transformer blocks",
    )
    target_experts: bool = option(
        False, "adapt the experts of a mixture too, each with a rank of its own"
    )
    num_layers: int = option(
        -1,
        "adapt only the last so many blocks; -1: all (mlx-lm: 16), since the ranks are placed by "
        "sensitivity anyway",
        at_least=-1,
    )
    calibration_samples: int = option(
        256, "training samples to calibrate on, drawn by --seed; all if there are fewer", at_least=1
    )
    batch_size: int = option(
        4, "samples per batch, over all processes of mlx.launch together", at_least=1
    )
    grad_checkpoint: bool = option(False, "recompute activations in the backward pass: less memory")
    allow_unexportable: bool = option(
        False, "go on with a model family or module whose export will be refused"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers == 0:
            raise UserError("--num-layers must be -1 (all) or at least 1, not 0")
        if self.alpha is None:
            self.alpha = float(self.rank)


@dataclass(kw_only=True)
class PlanCommand(PlanConfig):
    """``python -m tlora_mlx.plan``, and what ``tlora_mlx.plan`` takes.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is outside of what its option allows.
    """

    model: str | None = option(None, "model directory, or a Hub repository that mlx-lm loads")
    data: str | None = option(None, "directory with train.jsonl, or a Hub data set, as for train")
    sensitivities: str | None = option(
        None,
        "an earlier plan: allocate from its sensitivities by --rank, --alpha and --max-rank, "
        "without model and data",
    )
    output: str = option("plan.json", "where the plan goes; a picture beside it with matplotlib")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sensitivities is None and not (self.model and self.data):
            raise UserError("--model and --data must be given, or --sensitivities; see --help")


# What makes ranks, scales and A, where no adapter brings them.
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
    """``python -m tlora_mlx.train``, and what ``tlora_mlx.train`` takes.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is outside of what its option allows.
    """

    adapter_path: str = option("adapters", "run directory to make")
    resume: bool = option(
        False,
        "go on with the run in --adapter-path from its newest whole checkpoint, to the same result "
        "as if it had never stopped; its options need not be given again",
    )
    plan: str | None = option(
        None, "take ranks and scales from this file of tlora plan, edited by hand or not"
    )
    from_adapter: str | None = option(
        None,
        "start from this adapter (a run, PEFT's or mlx-lm's) instead of calibrating: its ranks, "
        "scales, A and B, of which A stays frozen",
    )
    covariance: str = option(
        "auto",
        "exact keeps covariances (in × in), in as many passes over the calibration samples as "
        "--calibration-memory asks for; streaming keeps a few (in × (rank + 32)) per module "
        "and takes some 5 passes forwards; auto: exact where the one pass will do",
        choices=("auto", "exact", "streaming"),
    )
    calibration_memory: float | None = option(
        None,
        "GB that covariances may take; default: a quarter of the memory that the machine "
        "recommends for the GPU",
        above=0.0,
    )
    iters: int = option(
        1000, "optimizer updates (each takes --grad-accumulation-steps batches)", at_least=1
    )
    epochs: int | None = option(
        None, "train for so many passes over the data instead of --iters", at_least=1
    )
    optimizer: str = option(
        "adamw", "with bias correction, unlike mlx-lm's adam", choices=("adam", "adamw")
    )
    learning_rate: float = option(
        1e-4,
        "peak learning rate of B (mlx-lm: 1e-5 at scale 20; here scales start at 1)",
        above=0.0,
        below=3e38,
    )
    lr_schedule: str = option(
        "cosine",
        "after the warm-up; the paper trains with cosine or linear (mlx-lm: constant)",
        choices=("cosine", "linear", "constant"),
    )
    warmup: float = option(
        0.03,
        "share of the updates in which the rate rises from 0, as in the paper",
        at_least=0.0,
        at_most=1.0,
    )
    weight_decay: float = option(0.0, "adamw's weight decay of B", at_least=0.0)
    grad_accumulation_steps: int = option(
        1, "batches per optimizer update, weighted by their tokens", at_least=1
    )
    max_grad_norm: float = option(
        1.0,
        "the gradient is scaled down to this norm, as in transformers' trainer; 0: never (mlx-lm)",
        at_least=0.0,
    )
    skip_nonfinite: int = option(
        0,
        "leave out so many updates whose loss or gradient is not finite, instead of stopping",
        at_least=0,
    )
    val_batches: int = option(25, "validation batches per evaluation; -1: all", at_least=-1)
    steps_per_report: int = option(10, "updates between reports of the training loss", at_least=1)
    steps_per_eval: int = option(200, "updates between validations", at_least=1)
    early_stop: int | None = option(
        None,
        "stop after so many validations in a row without a lower loss than the lowest",
        at_least=1,
    )
    save_every: int = option(100, "updates between checkpoints", at_least=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep", at_least=1)
    report_to: str | None = option(
        None, "also report to wandb or swanlab, or both (wandb,swanlab), through mlx-lm"
    )
    test: bool = option(False, "report the loss on test.jsonl before and after training")

    def __post_init__(self) -> None:
        if self.from_adapter and not self.resume:
            self._refuse_with_adapter()
        super().__post_init__()
        if self.val_batches == 0:
            raise UserError("--val-batches must be -1 (all) or at least 1, not 0")

    def _refuse_with_adapter(self) -> None:
        """An adapter that is gone on from has its ranks and A already."""
        given = [
            flag(item.name)
            for item in fields(self)
            if item.name in INITIALISATION_OPTIONS and getattr(self, item.name) != item.default
        ]
        if given:
            raise UserError(
                f"{', '.join(given)} cannot be given with --from-adapter, which brings its own "
                "ranks, scales and A; leave them out"
            )
