"""The rows of a file: JSON lines, a JSON array, CSV or Parquet, with their numbers."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from tlora_mlx.data.faults import Faults
from tlora_mlx.errors import UserError, first_line
from tlora_mlx.storage.files import is_unicode, read_json
from tlora_mlx.storage.foreign import open_file

# What a file of rows may be; of a split's files, the first counts.
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def numbered_in(path: Path) -> str:
    """What a file's rows are numbered in: "DIR/train.jsonl, line"."""
    return f"{path}, {'row' if path.suffix in SUFFIXES[1:] else 'line'}"


def read_row_file(path: Path, any_name: bool = False) -> list[tuple[int, Any]]:
    """The rows of a file with their numbers.

    Args:
        path: the file.
        any_name: read a file of another kind than ``SUFFIXES`` as JSON lines.

    Raises:
        UserError: there is no such file, it cannot be read, or has no rows.
    """
    if path.suffix == ".jsonl" or (any_name and path.suffix not in SUFFIXES):
        return _read_jsonl(path)
    readers = {".csv": _read_csv, ".parquet": _read_parquet, ".json": _read_array}
    if path.suffix not in readers:
        raise UserError(
            f"data {path} is a file of a kind that is not read; give one of "
            f"{', '.join(SUFFIXES)}, or a directory with train.jsonl"
        )
    try:
        open_file(path).close()
        rows = readers[path.suffix](path)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None
    except Exception as error:  # as many kinds as there are ways to fail
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not rows:
        raise UserError(f"{path} has no rows; delete it or put some into it")
    return rows


def _read_array(path: Path) -> list[tuple[int, Any]]:
    """The objects of a JSON array; or of JSON lines that are called .json, as on the Hub."""
    try:
        content = read_json(path, "the data")
    except UserError:
        with open_file(path) as file:
            if file.read(99).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise  # an array that is damaged
        return _read_jsonl(path)
    if not isinstance(content, list):
        raise UserError(f"{path} does not contain an array of rows")
    return list(enumerate(content, 1))


def _read_csv(path: Path) -> list[tuple[int, Any]]:
    """A table's rows, all cells as the texts that they are: an answer may be "007" or "NA"."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    faults, rows = Faults(f"{path}, row"), []
    with TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        names = list(table.fieldnames or ())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path} has more than one column {twice[0]!r}; rename one of them")
        if len(names) == 1 and (found := next((c for c in ";\t|" if c in names[0]), None)):
            raise UserError(f"{path} has {found!r} between its columns; save it with commas")
        for number, row in enumerate(table, 1):
            if None in row or None in row.values():
                cells = len(row.get(None, ())) + sum(row[name] is not None for name in names)
                faults.add(
                    number,
                    f" has {cells} cells, and the header has {len(names)}; put texts with commas "
                    "between double quotes",
                )
            rows.append((number, row))
    faults.raise_if_any()
    return rows


def _read_parquet(path: Path) -> list[tuple[int, Any]]:
    datasets = import_datasets(path)
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:  # datasets fails on one without rows
        if not file.metadata.num_rows:
            return []
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    finally:
        if shown:
            datasets.enable_progress_bars()
    return [(number, without_nulls(row)) for number, row in enumerate(table, 1)]


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the nulls that Arrow put into its objects.

    A column's objects have the fields of all rows there, so that the arguments of one tool's call
    have those of every other tool, as null.
    """

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cleaned(v) for key, v in value.items() if v is not None}
        return [cleaned(v) for v in value] if isinstance(value, list) else value

    return {key: cleaned(value) for key, value in row.items()}


def _read_jsonl(path: Path) -> list[tuple[int, Any]]:
    """The rows with their line numbers."""
    rows, faults = [], Faults(f"{path}, line")
    try:
        with TextIOWrapper(open_file(path), encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1 and line.lstrip().startswith("["):
                    raise UserError(
                        f"{path} is a JSON array, or part of one; give one object a line without "
                        "commas between them, or a whole array as .json"
                    )
                if number == 1 and line.strip() == "{":
                    raise UserError(
                        f"{path} has its first object on several lines; give each object one line"
                    )
                if line.strip():
                    try:
                        row = json.loads(line)
                        whole = "\\u" not in line or is_unicode(json.dumps(row, ensure_ascii=False))
                    except (ValueError, RecursionError) as error:  # ValueError: a huge number too
                        faults.add(number, f" is not valid JSON: {first_line(error)}")
                        continue
                    rows.append((number, row))
                    if not whole:
                        faults.add(
                            number,
                            " has half of a character (a lone surrogate such as \\ud83d), which no "
                            "tokenizer takes; remove it",
                        )
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    faults.raise_if_any()
    if not rows:
        raise UserError(f"{path} is empty; delete it or put one JSON object a line into it")
    return rows


def import_datasets(what: object) -> Any:
    """The package ``datasets``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{what} needs the package 'datasets': pip install datasets") from None
    return datasets
