"""The options of ``check``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tlora_mlx.config.help_groups import CHECK, Groups
from tlora_mlx.config.option import option
from tlora_mlx.config.training_options import TrainConfig


@dataclass(kw_only=True)
class CheckCommand(TrainConfig):
    """``python -m tlora_mlx.check``, and the configuration of ``tlora_mlx.check``.

    It takes the options of ``train``, so that a command can be checked before it is run.

    The fields are the options, with their help as ``metadata["help"]``.

    Raises:
        UserError: a value is not allowed for its option.
    """

    groups: ClassVar[Groups] = CHECK

    rows: int = option(3, "show N samples of the training data", at_least=0)
    json: str | None = option(
        None, "file for all samples, as JSON lines with split, row, tokens, counts and text"
    )
    fit: bool = option(
        False,
        "measure, by calibrating on one batch and training on the longest, how much memory the run "
        "takes and how long, and say what to change if it does not fit",
    )
    find_rate: bool = option(
        False, "find a learning rate: one calibration, then a short run at each of several rates"
    )
