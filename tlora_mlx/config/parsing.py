"""From flags and YAML to a configuration; an unknown name is an error that suggests the nearest."""

from __future__ import annotations

import difflib
import math
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from tlora_mlx.config.arguments import make_parser, shown_name
from tlora_mlx.config.data_options import DataConfig
from tlora_mlx.config.mlx_lm_options import MLX_LM_FLAGS, ONLY_MLX_LM, Translation
from tlora_mlx.config.option import Config, flag, kind_of, may_be_list, words_of
from tlora_mlx.errors import UserError, shown
from tlora_mlx.storage.files import read_yaml, user_path

C = TypeVar("C", bound=Config)


def parse(
    config_class: type[C],
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    also_known: type | None = None,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given,
    note: Callable[[str], object] = lambda text: None,
) -> C:
    """Make a configuration from the command line and, with ``-c``, a YAML file; flags win.

    Commands that read data take mlx-lm's options too, by its names, and translate them.

    Args:
        config_class: a subclass of ``Config``.
        prog: the command's name in the help.
        description: its first line.
        argv: the arguments; None: those of the process.
        also_known: a configuration whose options are accepted in the YAML too, but ignored.
        complete: adds options that follow from those that were given.
        note: is told in one line what was translated from mlx-lm's options.

    Raises:
        UserError: an argument, a key or a value is invalid; the message names the flag or the file.
    """
    parser = make_parser(config_class, prog, description, "--help-all" in (argv or sys.argv))
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    flags = {name: given[name] for name in given.keys() - {*MLX_LM_FLAGS, "config"}}
    values: dict[str, Any] = {}
    if issubclass(config_class, DataConfig):
        path = given.pop("config", None)
        own = {item.name for item in fields(config_class)}
        known = own | ({item.name for item in fields(also_known)} if also_known else set())
        translation = Translation(
            (_read_yaml(user_path(path), known | {*ONLY_MLX_LM}) if path is not None else {})
            | {name: given[name] for name in given.keys() & {*MLX_LM_FLAGS}},
            flags,
        )
        values = {name: value for name, value in translation.values.items() if name in own}
        if "iters" in flags and "epochs" not in flags:  # which would count instead of the flag
            values.pop("epochs", None)
        if line := translation.line():
            note(line)
    values = complete(_typed(values | flags, config_class))
    return _made(config_class, values)


def from_keywords(
    config_class: type[C],
    options: Mapping[str, Any],
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given,
) -> C:
    """Make a configuration from Python keywords; paths may be ``Path`` objects.

    Args:
        config_class: a subclass of ``Config``.
        options: by their names.
        complete: adds options that follow from those that were given.

    Raises:
        UserError: a name or a value is invalid; the message names the flag.
    """
    known = {item.name for item in fields(config_class)}
    if unknown := [name for name in options if name not in known]:
        nearest = difflib.get_close_matches(unknown[0], sorted(known), n=1, cutoff=0.0)[0]
        raise UserError(f"unknown option '{unknown[0]}'; the nearest one is '{nearest}'")
    given = {k: v for k, v in _plain(dict(options)).items() if v is not None}
    return _made(config_class, complete(_typed(given, config_class)))


def _plain(value: Any) -> Any:
    """A value as YAML would hold it: paths are texts, tuples are lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _made(config_class: type[C], values: dict[str, Any]) -> C:
    """The configuration with these values.

    Raises:
        UserError: a required one is missing, or a value is not allowed.
    """
    missing = [f for f in fields(config_class) if f.default is MISSING and f.name not in values]
    if missing:
        raise UserError(f"missing: {', '.join(shown_name(f) for f in missing)}; see --help")
    return config_class(**_typed(values, config_class))


def _typed(values: dict[str, Any], config_class: type) -> dict[str, Any]:
    """The values, converted to their options' types."""
    hints = typing.get_type_hints(config_class)
    return {name: _convert(value, hints[name], flag(name)) for name, value in values.items()}


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Convert ``value``, from a flag (text) or YAML (text or typed), to the option's type.

    PyYAML reads 1e-4 as text, so numbers are accepted as text from both.
    """
    kind = kind_of(hint)
    if value is None:
        if type(None) not in typing.get_args(hint):
            raise UserError(f"{name} must have a value")
        return None
    words = words_of(hint)
    if value in words:
        return value
    if may_be_list(hint) and isinstance(value, (list, dict)):
        entries = value if isinstance(value, list) else [value]
        return entries[0] if len(entries) == 1 and isinstance(entries[0], str) else entries
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(i, str) and i for i in items):
            raise UserError(f"{name} must be a list of names, not {shown(value)}")
        return items
    if kind in (str, bool):
        if type(value) is not kind:
            what = "text" if kind is str else "true or false"
            raise UserError(f"{name} must be {what}, not {shown(value)}")
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
        raise UserError(f"{name} must be {what}, not {shown(value)}") from None


def _read_yaml(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options that a YAML file sets; all that are not known are one error."""
    data = read_yaml(path, "the configuration file")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(
            f"the configuration file {path} must contain options as 'name: value' lines"
        )
    texts = {key if isinstance(key, str) else shown(key): value for key, value in data.items()}
    values = {key.replace("-", "_"): value for key, value in texts.items()}
    if twice := sorted(key for key in texts if "-" in key and key.replace("-", "_") in texts):
        raise UserError(
            f"{path} has both '{twice[0]}' and '{twice[0].replace('-', '_')}', which are the same "
            "option; delete one of them"
        )
    unknown = [name for name in values if name not in known]
    nearest = [difflib.get_close_matches(n, sorted(known), n=1, cutoff=0.0)[0] for n in unknown]
    if len(unknown) == 1:
        raise UserError(
            f"{path} has an unknown option '{unknown[0]}'; the nearest one is '{nearest[0]}'"
        )
    if unknown:
        told = (f"'{name}' (nearest: '{n}')" for name, n in zip(unknown, nearest, strict=True))
        raise UserError(f"{path} has unknown options: {', '.join(told)}")
    return values
