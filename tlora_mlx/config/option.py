"""An option is a field of a configuration, with its help and bounds; every value is checked."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from typing import Any, ClassVar

from tlora_mlx.config.help_groups import TRAINING, Groups
from tlora_mlx.errors import UserError, shown

# What any option may be at most: sums and products of it, in floats and 64 bits, stay finite.
LARGEST = {bool: 1, int: 2**53, float: 1e30}

# The help of an option that many commands have.
TRUST_REMOTE_CODE = "let the model's repository run its own code"


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    positional: bool = False,
) -> Any:
    """A field of a configuration: its default (``MISSING``: required), its help and its bounds."""
    metadata = {
        "help": help,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "choices": choices,
        "positional": positional,
    }
    return (
        field(metadata=metadata)
        if default is MISSING
        else field(default=default, metadata=metadata)
    )


def flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def kind_of(hint: Any) -> Any:
    """The type inside a union: int for ``int | None``, float for ``float | Literal["auto"]``."""
    options = [h for h in typing.get_args(hint) if h is not type(None)]
    return options[0] if options and typing.get_origin(hint) is not list else hint


def words_of(hint: Any) -> tuple[str, ...]:
    """What may stand in place of a number: auto for ``float | Literal["auto"]``."""
    literals = (h for h in typing.get_args(hint) if typing.get_origin(h) is typing.Literal)
    return tuple(word for literal in literals for word in typing.get_args(literal))


def may_be_list(hint: Any) -> bool:
    """Whether an option is one text or a list whose entries its configuration checks."""
    options = typing.get_args(hint)
    return str in options and any(typing.get_origin(option) is list for option in options)


class Config:
    """Base class of all configurations: every value is checked on construction."""

    # How the help groups the options of a command that has many.
    groups: ClassVar[Groups] = TRAINING

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item, getattr(self, item.name), flag(item.name))

    def to_dict(self) -> dict[str, Any]:
        """All options by their YAML names."""
        return dataclasses.asdict(self)


def _check(item: dataclasses.Field, value: Any, name: str) -> None:
    """Compare a value with its field's bounds and choices."""
    rules = item.metadata
    if value is None:
        return
    if rules["choices"] and value not in rules["choices"]:
        one = "one of " if len(rules["choices"]) > 1 else ""
        raise UserError(f"{name} must be {one}{', '.join(rules['choices'])}, not {shown(value)}")
    if isinstance(value, str):  # text has no bounds
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}")
    if rules["at_least"] is not None and value < rules["at_least"]:
        raise UserError(f"{name} must be at least {rules['at_least']}, not {value}")
    if rules["above"] is not None and value <= rules["above"]:
        raise UserError(f"{name} must be above {rules['above']:g}, not {value}")
    if rules["below"] is not None and value >= rules["below"]:
        raise UserError(f"{name} must be below {rules['below']:g}, not {value}")
    if rules["at_most"] is not None and value > rules["at_most"]:
        raise UserError(f"{name} must be at most {rules['at_most']:g}, not {value}")
    if isinstance(value, (int, float)) and abs(value) > LARGEST[type(value)]:
        raise UserError(f"{name} must be at most {LARGEST[type(value)]:g}, not {shown(value)}")
