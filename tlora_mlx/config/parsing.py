"""From flags and YAML to a configuration; an unknown name is an error that suggests the nearest."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tlora_mlx.config.option import flag
from tlora_mlx.config.training_options import DataConfig
from tlora_mlx.errors import UserError
from tlora_mlx.storage.files import read_yaml, user_path
from tlora_mlx.version import __version__

C = TypeVar("C")


def parse(
    config_class: type[C],
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    also_known: type | None = None,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given,
) -> C:
    """Make a configuration from the command line and, with ``-c``, a YAML file; flags win.

    Args:
        config_class: a subclass of ``Config``.
        prog: the command's name in the help.
        description: its first line.
        argv: the arguments; None: those of the process.
        also_known: a configuration whose options are accepted in the YAML too, but ignored.
        complete: adds options that follow from those that were given.

    Raises:
        UserError: an argument, a key or a value is invalid; the message names the flag or the file.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tlora_mlx {__version__}")
    if issubclass(config_class, DataConfig):
        parser.add_argument(
            "-c", "--config", metavar="FILE", help="YAML file with the same options; flags win"
        )
    for item in fields(config_class):
        _add_argument(parser, item, typing.get_type_hints(config_class)[item.name])
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    values: dict[str, Any] = {}
    if (path := given.pop("config", None)) is not None:
        values = _read_yaml(user_path(path), config_class, also_known)
    values = complete(_typed(values | given, config_class))
    missing = [f for f in fields(config_class) if f.default is MISSING and f.name not in values]
    if missing:
        raise UserError(f"missing: {', '.join(_shown(f) for f in missing)}; see --help")
    return config_class(**_typed(values, config_class))


def _typed(values: dict[str, Any], config_class: type) -> dict[str, Any]:
    """The values, converted to their options' types."""
    hints = typing.get_type_hints(config_class)
    return {name: _convert(value, hints[name], flag(name)) for name, value in values.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _shown(item: dataclasses.Field) -> str:
    return item.name.upper() if item.metadata["positional"] else flag(item.name)


def _kind(hint: Any) -> Any:
    """The type inside a union: int for ``int | None``, float for ``float | Literal["auto"]``."""
    options = [h for h in typing.get_args(hint) if h is not type(None)]
    return options[0] if options and typing.get_origin(hint) is not list else hint


def _words(hint: Any) -> tuple[str, ...]:
    """What may stand in place of a number: auto for ``float | Literal["auto"]``."""
    literals = (h for h in typing.get_args(hint) if typing.get_origin(h) is typing.Literal)
    return tuple(word for literal in literals for word in typing.get_args(literal))


def _add_argument(parser: argparse.ArgumentParser, item: dataclasses.Field, hint: Any) -> None:
    """Values arrive as text (True or False for a flag); ``_convert`` converts them."""
    text = item.metadata["help"].replace("%", "%%")
    if item.default is not MISSING and item.default is not None and item.default is not False:
        text += f" (default: {item.default})"
    kind = _kind(hint)
    if item.metadata["positional"]:
        parser.add_argument(item.name, nargs="?", metavar=item.name.upper(), help=text)
    elif kind is bool:
        action = "store_true" if hint is bool else argparse.BooleanOptionalAction
        parser.add_argument(flag(item.name), action=action, default=None, help=text)
    elif typing.get_origin(kind) is list:
        parser.add_argument(flag(item.name), nargs="+", action="extend", metavar="NAME", help=text)
    else:
        metavar = "|".join(item.metadata["choices"]) or "|".join(
            ({int: "N", float: "X"}.get(kind, "TEXT"), *_words(hint))
        )
        parser.add_argument(flag(item.name), metavar=metavar, help=text)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Convert ``value``, from a flag (text) or YAML (text or typed), to the option's type.

    PyYAML reads 1e-4 as text, so numbers are accepted as text from both.
    """
    kind = _kind(hint)
    if value is None:
        if type(None) not in typing.get_args(hint):
            raise UserError(f"{name} must have a value")
        return None
    words = _words(hint)
    if value in words:
        return value
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(i, str) and i for i in items):
            raise UserError(f"{name} must be a list of names, not {value!r}")
        return items
    if kind in (str, bool):
        if type(value) is not kind:
            what = "text" if kind is str else "true or false"
            raise UserError(f"{name} must be {what}, not {value!r}")
        if value == "":
            raise UserError(f"{name} must not be empty")
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        number = kind(value)
        if number != float(value) and math.isfinite(float(value)):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        what = " or ".join(("a whole number" if kind is int else "a number", *words))
        raise UserError(f"{name} must be {what}, not {value!r}") from None


def _read_yaml(path: Path, config_class: type, also_known: type | None) -> dict[str, Any]:
    """The options of ``config_class`` that a YAML file sets."""
    data = read_yaml(path, "the configuration file")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(
            f"the configuration file {path} must contain options as 'name: value' lines"
        )
    own = {item.name for item in fields(config_class)}
    known = own | ({item.name for item in fields(also_known)} if also_known else set())
    values = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise UserError(f"{path} has an unknown option '{key}'; the nearest one is '{nearest}'")
        if name in own:
            values[name] = value
    return values
