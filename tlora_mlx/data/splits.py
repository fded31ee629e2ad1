"""The rows of each split of a source, read from files or through the package ``datasets``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tlora_mlx.data.row_files import (
    SUFFIXES,
    import_datasets,
    numbered_in,
    read_row_file,
    without_nulls,
)
from tlora_mlx.data.sources import DataSource, existing_path, sources_of
from tlora_mlx.errors import UserError, first_line
from tlora_mlx.storage.hub_names import can_be_repository, why_not_provided

# What ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` leave behind.
_SAVED = ("dataset_dict.json", "state.json")


class NumberedRows(NamedTuple):
    """Rows with their numbers, and what they are numbered in: "DIR/train.jsonl, line"."""

    numbered: list[tuple[int, Any]]
    where: str


class _Table(NamedTuple):
    """A split as it is stored; its rows are made when they are wanted.

    Attributes:
        where: what its rows are numbered in.
        length: how many rows it has.
        part: the rows from one position up to another, with their numbers.
    """

    where: str
    length: int
    part: Callable[[int, int], list[tuple[int, Any]]]


def read_splits(
    source: DataSource, wanted: Sequence[str] = ("train",)
) -> dict[str, NumberedRows | None]:
    """The rows of the splits ``train``, ``valid`` and ``test``; None where there is none.

    Args:
        source: a file, which is a training split; a directory with ``train`` and maybe ``valid``
            (or ``validation``) and ``test``, each a ``.jsonl``, ``.json``, ``.parquet`` or ``.csv``
            file, or one that ``save_to_disk`` wrote or that a Hub data set was downloaded into; or
            a Hub data set with splits of these names. A split's expression takes its rows from any.
        wanted: the splits of which one at least must be there.

    Raises:
        UserError: it cannot be had, has none of the wanted splits, or an expression is wrong.
    """
    path, files = existing_path(source), {}
    if path is not None and path.is_file():
        tables = {"train": _file_table(path)}
    elif path is not None and not source.config and (files := _files(path)):
        needed = {name for names in map(_names_in, _expressions(source)) for name in names}
        tables = {stem: _file_table(file) for stem, file in files.items() if stem in needed}
    else:
        tables = _loaded(source, path)
    available = files or tables
    names = _split_names(source.path, tables if source.valid_split is None else ())
    rows: dict[str, NumberedRows | None] = {}
    for split, expression in source.splits().items():
        if expression:
            rows[split] = _expressed(expression, tables, source.path, available)
        else:
            rows[split] = _whole(tables[names[split]]) if names[split] in tables else None
    if not any(rows[split] for split in wanted):
        missing = " or ".join(repr(names[split]) for split in wanted)
        if path is not None and wanted[0] == "train":
            raise UserError(
                f"the data directory {path} has no train{', train'.join(SUFFIXES)}; put the "
                "training rows into one of them"
            )
        found = ", ".join(tables) or "nothing that is read"
        raise UserError(f"data set {source.path} has no split {missing}, only {found}")
    return rows


def is_read(file: Path, data: Any) -> bool:
    """Whether a file is one that the option ``data`` reads, or would if it were there."""
    file = file.resolve()
    places = [path.resolve() for source in sources_of(data) if (path := existing_path(source))]
    split = file.stem in ("train", "valid", "validation", "test") and file.suffix in SUFFIXES
    return file in places or (split and file.parent in places)


def _expressions(source: DataSource) -> list[str]:
    """What names the splits that are read; the second goes by two names where none is given."""
    return [
        expression or ("valid+validation" if split == "valid" else split)
        for split, expression in source.splits().items()
    ]


def _names_in(expression: str) -> list[str]:
    """The splits that an expression such as ``train[:80%]+test`` takes rows from."""
    return [part.split("[")[0].strip() for part in expression.split("+")]


def _whole(table: _Table) -> NumberedRows | None:
    rows = table.part(0, table.length)
    return NumberedRows(rows, table.where) if rows else None


def _expressed(
    expression: str, tables: Mapping[str, _Table], name: str, available: Collection[str]
) -> NumberedRows:
    """The rows that an expression such as ``train[:80%]`` selects, as ``datasets`` does.

    Raises:
        UserError: it is none, names a split that is not there, or selects nothing.
    """
    for needed in _names_in(expression):
        if needed not in tables:
            raise UserError(
                f"data {name}, split '{expression}': there is no split '{needed}', only "
                f"{', '.join(available)}"
            )
    parts = [(expression, 0, None)]
    if expression not in tables:
        reader = import_datasets(f"the split {expression}").ReadInstruction
        lengths = {split: table.length for split, table in tables.items()}
        try:
            absolute = reader.from_spec(expression).to_absolute(lengths)
        except (ValueError, AssertionError) as error:
            raise UserError(f"data {name}, split '{expression}': {first_line(error)}") from None
        parts = [(part.splitname, part.from_, part.to) for part in absolute]
    rows, where = [], ""
    for split, start, stop in parts:
        table = tables[split]
        rows += table.part(start, table.length if stop is None else stop)
        where = table.where
    if len(parts) > 1:
        rows = [(number, row) for number, (_, row) in enumerate(rows, 1)]
        where = f"data {name}, split {expression}, row"
    if not rows:
        raise UserError(f"data {name}: the split '{expression}' has no rows")
    return NumberedRows(rows, where)


def _files(path: Path) -> dict[str, Path]:
    """A directory's files of rows by their stems; JSON lines before the others."""
    if any((path / name).is_file() for name in _SAVED):
        return {}
    found: dict[str, Path] = {}
    for suffix in reversed(SUFFIXES):
        found |= {file.stem: file for file in path.glob(f"*{suffix}")}
    return found


def _file_table(path: Path) -> _Table:
    rows = read_row_file(path)
    return _Table(numbered_in(path), len(rows), lambda start, stop: rows[start:stop])


def _loaded(source: DataSource, path: Path | None) -> dict[str, _Table]:
    """The splits of what the package ``datasets`` loads: from the Hub, or from a directory.

    Raises:
        UserError: it cannot.
    """
    name, _, configuration = source.path.partition(":")
    if path is None and (name.endswith(SUFFIXES) or not can_be_repository(name)):
        raise UserError(f"data {source.path} does not exist")
    saved = path is not None and any((path / file).is_file() for file in _SAVED)
    if (
        path is not None
        and not saved
        and not any(file.suffix in SUFFIXES for file in path.glob("**/*") if file.is_file())
    ):
        return {}
    datasets = import_datasets(
        f"data {source.path} is no directory here, and a Hub data set"
        if path is None
        else f"data {source.path}"
    )
    try:
        if saved:
            loaded = datasets.load_from_disk(str(path))
        else:
            names = [str(path)] if path else [name, configuration] if configuration else [name]
            loaded = datasets.load_dataset(*names, **source.config)
    except Exception as error:  # as many kinds as there are ways to fail
        where = (
            "cannot be read"
            if path
            else ("is no directory here, and the Hugging Face Hub did not provide it")
        )
        raise UserError(f"data {source.path} {where}: {why_not_provided(error)}") from None
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
    return {
        split: _Table(
            f"data set {source.path}, split {_shown(split)}, row", len(table), _labelled(table)
        )
        for split, table in splits.items()
    }


def _shown(split: str) -> str:
    return "valid" if split == "validation" else split


def _labelled(table: Any) -> Callable[[int, int], list[tuple[int, Any]]]:
    """A part of a split's rows with their numbers, class labels by name.

    NumberedRows whose label is withheld (−1, as in the test splits of GLUE) are left out.
    """
    from datasets import ClassLabel

    labels = {k: kind for k, kind in table.features.items() if isinstance(kind, ClassLabel)}

    def part(start: int, stop: int) -> list[tuple[int, Any]]:
        rows = []
        for number, row in enumerate(table.select(range(start, stop)), start + 1):
            if all(row[key] not in (None, -1) for key in labels):
                named = {key: kind.int2str(row[key]) for key, kind in labels.items()}
                rows.append((number, without_nulls({**row, **named})))
        return rows

    return part


def _split_names(where: object, existing: Collection[str]) -> dict[str, str]:
    """What each split is called there: the second split goes by two names."""
    if {"valid", "validation"} <= set(existing):
        raise UserError(f"{where} has both 'valid' and 'validation'; keep one of them")
    second = "validation" if "validation" in existing else "valid"
    return {"train": "train", "valid": second, "test": "test"}
