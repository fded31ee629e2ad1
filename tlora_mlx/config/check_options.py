"""The options of ``check``."""

from __future__ import annotations

from dataclasses import dataclass

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

    rows: int = option(3, "how many samples of the training data to show", at_least=0)
    json: str | None = option(
        None, "file to write all samples to, as JSON lines: split, row, tokens, counts, text"
    )
    fit: bool = option(
        False,
        "calibrate on one batch and train on the longest one: how much memory this takes, how "
        "long the run will take, and what to change if it does not fit",
    )
    find_rate: bool = option(
        False, "find a learning rate by short runs, each at another rate, from one calibration"
    )
