"""Evaluation data: reading a file of rows, and the columns of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tlora_mlx.data.row_files import numbered_in, read_row_file
from tlora_mlx.data.sources import DataSource
from tlora_mlx.data.splits import read_splits
from tlora_mlx.errors import UserError
from tlora_mlx.storage.files import user_path

# The columns in which public test sets have the question, if there is no prompt, and the answer.
QUESTIONS = ("question", "query", "problem", "instruction", "text")
ANSWERS = ("answer", "completion", "response", "solution", "output")


class Row(NamedTuple):
    """A row: its number in the file (the line, or the index in an array), a label, its columns."""

    number: int
    where: str
    columns: dict[str, Any]

    def text(self, *names: str) -> str:
        """The first of these columns that the row has, as text; numbers are converted.

        Raises:
            UserError: it has none of them, or it is neither text nor number, or empty.
        """
        for name in names:
            value = self.columns.get(name)
            if isinstance(value, (str, int, float)) and not isinstance(value, bool):
                self._check(name, str(value))
                return str(value)
            if value is not None:
                raise UserError(f"{self.where}: '{name}' is not text: {str(value)[:40]}")
        if empty := [name for name in names if name in self.columns]:
            raise UserError(f"{self.where}: '{empty[0]}' is null")
        found = ", ".join(map(repr, self.columns)) or "nothing"
        raise UserError(f"{self.where} has {found}; it needs {' or '.join(map(repr, names))}")

    def texts(self, name: str) -> list[str]:
        """A column that is a list of texts, at least one.

        Raises:
            UserError: it is not.
        """
        value = self.columns.get(name)
        if not isinstance(value, list) or not value:
            raise UserError(f"{self.where}: '{name}' is not a list of one or more texts")
        for text in value:
            self._check(name, text)
        return value

    def _check(self, name: str, text: Any) -> None:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{self.where}: '{name}' is empty, or part of it is not text")


def read_rows(data: str, limit: int | None = None) -> list[Row]:
    """The first rows, at most ``limit``, of a file or of a Hub data set.

    Args:
        data: a file (``.jsonl``, ``.json``, ``.csv``, ``.parquet``); or a directory with
            ``test.jsonl``, or a Hub data set as NAME or NAME:CONFIGURATION, whose test split is
            read, or its validation split if there is no test split with labels.

    Raises:
        UserError: there is no such data, it has no rows, or a row is not a JSON object.
    """
    path = user_path(data)
    if path.is_file():
        numbered, what = read_row_file(path, any_name=True), numbered_in(path)
    elif path.suffix in (".json", ".jsonl"):
        raise UserError(f"--data {path} does not exist; give a file of JSON lines")
    else:
        splits = read_splits(DataSource(data), ("test", "valid"))
        split = "test" if splits["test"] else "valid"
        numbered, what = splits[split]
    rows = []
    for number, columns in numbered[:limit]:
        where = f"{what} {number}"
        if not isinstance(columns, Mapping):
            raise UserError(f"{where} is not a JSON object")
        rows.append(Row(number, where, columns))
    return rows
