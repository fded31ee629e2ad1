"""Rows of data from files and from the Hugging Face Hub, and all splits of them as samples."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora_mlx.data.formats import renamed
from tlora_mlx.data.samples import Split
from tlora_mlx.data.tokenizing import Faults, tokenize
from tlora_mlx.errors import UserError, first_line
from tlora_mlx.storage.files import is_unicode, user_path
from tlora_mlx.storage.foreign import open_file
from tlora_mlx.storage.hub_names import can_be_repository

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# What a split's file may be; where there are several, the first counts.
SUFFIXES = (".jsonl", ".parquet", ".csv")


def load_data(
    data: str,
    tokenizer: TokenizerWrapper,
    max_seq_length: int,
    mask_prompt: bool | None,
    format: str | None = None,
    max_samples: int | None = None,
    columns: Mapping[str, str] | None = None,
    embeddings: int | None = None,
) -> dict[str, Split]:
    """Read and tokenize all splits; a split without a file is empty.

    Args:
        data: a directory with ``train`` and maybe ``valid`` (or ``validation``) and ``test``, each
            a ``.jsonl``, ``.csv`` or ``.parquet`` file; or the name of a Hub data set with splits
            of these names; a configuration of it follows after a colon.
        tokenizer: the model's.
        max_seq_length: in tokens; longer samples are cut.
        mask_prompt: None: wherever the rows have a prompt.
        format: name of the formatter (``formats.FORMATS``) that the rows go through first.
        max_samples: only the first so many rows of the training split.
        columns: ``prompt``, ``completion``, ``messages`` by the name of the column that has it.
        embeddings: how many token ids the model has; None where that is not known.

    Raises:
        UserError: no such data, a line that is not JSON, a row without the expected keys, a split
            or a training set without rows (file and line are named, all of them up to twenty).
    """
    path = user_path(data)
    if path.is_dir():
        files = _split_files(path)
        rows = {split: file and read_rows_of(file) for split, file in files.items()}
        where = {
            s: f"{f}, {'line' if f.suffix == '.jsonl' else 'row'}" for s, f in files.items() if f
        }
        if rows["train"] is None:
            raise UserError(f"the data directory {path} has no train.jsonl")
    elif path.exists():
        raise UserError(f"data {path} is a file; give the directory that holds train.jsonl")
    else:
        rows = download_rows(data, ["train"])
        where = {split: f"data set {data}, split {split}, row" for split in rows}
    rows["train"] = rows["train"][:max_samples]
    tokenized = {}
    for split, numbered in rows.items():
        if numbered is None:
            tokenized[split] = Split()
            continue
        numbered = _renamed(numbered, columns or {}, where[split])
        tokenized[split] = tokenize(
            numbered, where[split], tokenizer, max_seq_length, mask_prompt, format, embeddings
        )
    if not tokenized["train"].samples:
        raise UserError(
            f"no row of {data}'s training split has a token to learn from within "
            f"--max-seq-length {max_seq_length}"
        )
    return tokenized


def _renamed(
    rows: list[tuple[int, Any]], columns: Mapping[str, str], where: str
) -> list[tuple[int, Any]]:
    """The rows with their columns under the names that are trained on."""
    made, faults = [], Faults(where)
    for number, row in rows:
        try:
            made.append((number, renamed(row, columns)))
        except ValueError as error:
            faults.add(number, str(error))
    faults.raise_if_any()
    return made


def _split_files(path: Path) -> dict[str, Path | None]:
    """The file of each split in a directory; JSON lines before the others."""
    found: dict[str, Path] = {}
    for suffix in reversed(SUFFIXES):
        found |= {file.stem: file for file in path.glob(f"*{suffix}")}
    names = _split_names(path, found)
    return {split: found.get(name) for split, name in names.items()}


def read_rows_of(path: Path) -> list[tuple[int, Any]] | None:
    """The rows of a file with their numbers; None where there is no such file.

    Raises:
        UserError: it cannot be read, or holds no rows.
    """
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    try:
        open_file(path).close()
        rows = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    except UserError:
        raise
    except Exception as error:  # as many kinds as there are ways to fail
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not rows:
        raise UserError(f"{path} has no rows; delete it or put some into it")
    return rows


def _read_csv(path: Path) -> list[tuple[int, Any]]:
    """A table's rows, all cells as the texts that they are: an answer may be "007" or "NA"."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    faults, rows = Faults(f"{path}, row"), []
    with TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        names = list(table.fieldnames or ())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path} has more than one column {twice[0]!r}; rename one of them")
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
    datasets = _datasets(path)
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    finally:
        if shown:
            datasets.enable_progress_bars()
    return [(number, _without_nulls(row)) for number, row in enumerate(table, 1)]


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the nulls that Arrow put into its objects.

    A column's objects have the fields of all rows there, so that the arguments of one tool's call
    have those of every other tool, as null.
    """

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cleaned(v) for key, v in value.items() if v is not None}
        return [cleaned(v) for v in value] if isinstance(value, list) else value

    return {key: cleaned(value) for key, value in row.items()}


def _datasets(what: object) -> Any:
    """The package ``datasets``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{what} needs the package 'datasets': pip install datasets") from None
    return datasets


def _split_names(where: object, existing: Collection[str]) -> dict[str, str]:
    """What each split is called there: the second split goes by two names."""
    if {"valid", "validation"} <= set(existing):
        raise UserError(f"{where} has both 'valid' and 'validation'; keep one of them")
    second = "validation" if "validation" in existing else "valid"
    return {"train": "train", "valid": second, "test": "test"}


def read_jsonl(path: Path) -> list[tuple[int, Any]] | None:
    """The rows with their line numbers; None where there is no such file."""
    if not path.exists():
        return None
    rows, faults = [], Faults(f"{path}, line")
    try:
        with TextIOWrapper(open_file(path), encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
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


def download_rows(data: str, wanted: Sequence[str]) -> dict[str, list[tuple[int, Any]] | None]:
    """The rows of a Hub data set with their numbers, by split; None where there is no such split.

    Args:
        data: NAME or NAME:CONFIGURATION.
        wanted: the splits of which one at least must be there: train, valid, test.

    Raises:
        UserError: it cannot be had, or has none of the wanted splits.
    """
    if not can_be_repository(data.split(":", 1)[0]):
        raise UserError(f"data {data} does not exist")
    datasets = _datasets(f"data {data} is no directory here, and a Hub data set")
    try:
        dataset = datasets.load_dataset(*data.split(":", 1))
    except Exception as error:  # as many kinds as there are ways to fail
        raise UserError(
            f"data {data} is no directory here, and the Hugging Face Hub did not provide it: "
            f"{first_line(error)}"
        ) from None
    names = _split_names(data, dataset)
    rows = {
        split: _labelled(dataset[name]) if name in dataset else None
        for split, name in names.items()
    }
    if not any(rows[split] for split in wanted):
        missing = " or ".join(repr(names[split]) for split in wanted)
        raise UserError(f"data set {data} has no split {missing}, only {', '.join(dataset)}")
    return rows


def _labelled(split: Any) -> list[tuple[int, Any]] | None:
    """A Hub split's rows with their numbers, class labels by name; None where none is left.

    Rows whose label is withheld (−1, as in the test splits of GLUE) are left out.
    """
    from datasets import ClassLabel

    labels = {k: kind for k, kind in split.features.items() if isinstance(kind, ClassLabel)}
    rows = []
    for number, row in enumerate(split, 1):
        if all(row[key] not in (None, -1) for key in labels):
            named = {key: kind.int2str(row[key]) for key, kind in labels.items()}
            rows.append((number, _without_nulls({**row, **named})))
    return rows or None
