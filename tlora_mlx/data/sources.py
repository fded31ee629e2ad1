"""Where data comes from: files, directories and Hub data sets, one or several, mixed by weight."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tlora_mlx.data.formats import FORMATS, TRAINED_ON
from tlora_mlx.errors import UserError
from tlora_mlx.storage.files import user_path


@dataclass(frozen=True)
class DataSource:
    """One data set of those that are trained on. The fields are the keys of ``data`` in YAML.

    Attributes:
        path: a file, a directory, or a Hub data set as NAME or NAME:CONFIGURATION.
        weight: how often its training rows are seen in an epoch: 2: each of them twice; 0.5: half
            of them, drawn with the seed.
        config: further arguments of ``datasets.load_dataset``, such as ``name`` or ``data_files``.
        train_split: which rows to train on, as ``datasets`` writes it: ``train[:80%]``; None: the
            split of that name. So are ``valid_split`` and ``test_split``.
        format: name of the formatter that the rows go through; None: the option's.
        prompt_column: the column that holds the prompt; None: the option's. So are the others.
    """

    path: str
    weight: float = 1.0
    config: Mapping[str, Any] = field(default_factory=dict)
    train_split: str | None = None
    valid_split: str | None = None
    test_split: str | None = None
    format: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    text_column: str | None = None

    def splits(self) -> dict[str, str | None]:
        """The expression of each split; None: the split of that name."""
        return {name: getattr(self, f"{name}_split") for name in ("train", "valid", "test")}

    def columns(self) -> dict[str, str]:
        """``prompt``, ``completion``, ``messages``, ``text`` by the name of each one's column."""
        return columns_of({name: getattr(self, f"{name}_column") for name in TRAINED_ON})


def columns_of(given: Mapping[str, str | None]) -> dict[str, str]:
    """What is trained on, by the name of the column that holds it, for those that are named."""
    return {column: name for name, column in given.items() if column is not None}


def sources_of(data: str | Iterable[str | Mapping[str, Any]]) -> list[DataSource]:
    """The data sets that the option ``data`` names.

    Args:
        data: one, or several, each as a text PATH or PATH:WEIGHT, or as a mapping of this module's
            ``DataSource`` fields.

    Raises:
        UserError: an entry has no path, or a key or value that is not known.
    """
    entries = [data] if isinstance(data, (str, Mapping)) else list(data)
    if not entries:
        raise UserError("--data is empty; give at least one file, directory or Hub data set")
    return [_named(e) if isinstance(e, str) else _described(i, e) for i, e in enumerate(entries, 1)]


def is_plain(data: Any) -> bool:
    """Whether ``data`` is the name of one file, directory or Hub data set, and no more."""
    return isinstance(data, str) and _named(data).weight == 1.0


def resolved(data: str | Iterable[str | Mapping[str, Any]]) -> Any:
    """The option ``data`` with absolute paths where they exist, to be read from anywhere."""
    if isinstance(data, str):
        path, colon, weight = data.rpartition(":") if not is_plain(data) else (data, "", "")
        found = user_path(path)
        return f"{found.resolve() if found.exists() else path}{colon}{weight}"
    return [
        resolved(entry) if isinstance(entry, str) else {**entry, "path": resolved(entry["path"])}
        for entry in data
    ]


def names_of(data: Any) -> list[str]:
    """What a stored option ``data`` names, for people to read; empty if it is damaged."""
    try:
        return [source.path for source in sources_of(data)]
    except (UserError, TypeError):
        return []


def _named(text: str) -> DataSource:
    """PATH or PATH:WEIGHT; what exists under the whole text has no weight."""
    path, colon, weight = text.rpartition(":")
    try:
        number = float(weight) if colon and path and not _exists(text) else None
    except ValueError:
        number = None
    return (
        DataSource(text) if number is None else _checked(DataSource(path, number), f"--data {text}")
    )


def _exists(text: str) -> bool:
    try:
        return user_path(text).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _described(number: int, entry: Any) -> DataSource:
    """One entry of the list in YAML."""
    where = f"entry {number} of 'data'"
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} is neither a path nor a mapping with 'path': {entry!r}")
    known = {item.name for item in fields(DataSource)}
    for key in entry:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.0)[0]
            raise UserError(f"{where} has an unknown key '{key}'; the nearest one is '{nearest}'")
    given = {key: value for key, value in entry.items() if value is not None}
    if not isinstance(given.get("path"), str) or not given["path"]:
        raise UserError(f"{where} has no 'path'")
    weight = given.get("weight", 1.0)
    if isinstance(weight, str):  # PyYAML reads 1e-1 as text
        with suppress(ValueError):
            given["weight"] = weight = float(weight)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise UserError(f"{where}: 'weight' must be a number, not {weight!r}")
    if not isinstance(given.get("config", {}), Mapping):
        raise UserError(f"{where}: 'config' must be a mapping of load_dataset's arguments")
    texts = known - {"path", "weight", "config"}
    for key in sorted(texts & given.keys()):
        if not isinstance(given[key], str):
            raise UserError(f"{where}: '{key}' must be text, not {given[key]!r}")
    return _checked(DataSource(**given), where)


def _checked(source: DataSource, where: str) -> DataSource:
    """The source, if its values are allowed.

    Raises:
        UserError: they are not.
    """
    if not (math.isfinite(source.weight) and 0 < source.weight <= 1000):
        raise UserError(
            f"{where}: the weight must be above 0 and at most 1000, not {source.weight:g}"
        )
    if source.format is not None and source.format not in FORMATS:
        raise UserError(f"{where}: 'format' must be one of {', '.join(FORMATS)}")
    if refused := sorted({"path", "split", "streaming"} & source.config.keys()):
        raise UserError(
            f"{where}: 'config' cannot have {', '.join(refused)}; splits go into train_split, "
            "valid_split and test_split"
        )
    return source


def existing_path(source: DataSource) -> Path | None:
    """The file or directory of a source; None if there is none, so that it is a Hub data set."""
    return user_path(source.path) if _exists(source.path) else None
