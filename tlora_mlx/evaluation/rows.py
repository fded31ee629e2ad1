"""Evaluation data: a file of rows, and how a row is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tlora_mlx.errors import UserError
from tlora_mlx.files import read_json
from tlora_mlx.training.data import read_jsonl

# What the public test sets call the question, where it is not a ready prompt, and the answer.
QUESTIONS = ("question", "query", "problem", "instruction", "text")
ANSWERS = ("answer", "completion", "response", "solution", "output")


class Row(NamedTuple):
    """One row: its number in the file (its line, or its place in an array), what it is called in
    messages, and its columns.
    """

    number: int
    where: str
    columns: dict[str, Any]

    def text(self, *names: str) -> str:
        """The first of these columns that the row has, as a text; numbers are written out.

        Raises:
            UserError: it has none of them, or it is neither text nor number.
        """
        for name in names:
            value = self.columns.get(name)
            if isinstance(value, (str, int, float)) and not isinstance(value, bool):
                return str(value)
            if value is not None:
                raise UserError(f"{self.where}: '{name}' is not a text but {str(value)[:40]}")
        found = ", ".join(map(repr, self.columns)) or "nothing"
        raise UserError(f"{self.where} has {found}; it needs {' or '.join(map(repr, names))}")

    def texts(self, name: str) -> list[str]:
        """A column that is a list of texts, at least one.

        Raises:
            UserError: it is not.
        """
        value = self.columns.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise UserError(f"{self.where}: '{name}' is not a list of texts, one at least")
        return value


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The rows of a JSON-lines file, or of a ``.json`` file with an array; at most ``limit``.

    Raises:
        UserError: there is no such file, it holds no rows, or one is not a JSON object.
    """
    if path.is_dir():
        raise UserError(f"--data {path} is a directory; give the file to evaluate on")
    if path.suffix == ".json":
        data = read_json(path, "the evaluation data")
        if not isinstance(data, list) or not data:
            raise UserError(f"{path} holds no array of rows")
        numbered, what = list(enumerate(data, 1)), "row"
    else:
        numbered, what = read_jsonl(path), "line"
        if numbered is None:
            raise UserError(f"--data {path} does not exist; give a file of JSON lines")
    rows = []
    for number, columns in numbered[:limit]:
        where = f"{path}, {what} {number}"
        if not isinstance(columns, Mapping):
            raise UserError(f"{where} is not a JSON object")
        rows.append(Row(number, where, columns))
    return rows
