"""All splits of the data as samples of token ids, one data set or several mixed by weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tlora_mlx.data.faults import Faults
from tlora_mlx.data.formats import renamed
from tlora_mlx.data.samples import Split, mixed, split_off
from tlora_mlx.data.sources import DataSource, sources_of
from tlora_mlx.data.splits import NumberedRows, read_splits
from tlora_mlx.data.tokenizing import RowTokenizer, check_first_row
from tlora_mlx.errors import UserError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class SourceRows(NamedTuple):
    """The rows of one source, before a tokenizer is needed.

    Attributes:
        source: where they are from.
        splits: ``train``, ``valid`` and ``test``; None where there is none.
        format: name of the formatter that they go through; None: what the first row shows.
    """

    source: DataSource
    splits: dict[str, NumberedRows | None]
    format: str | None


def read_rows(
    data: str | Iterable[str | Mapping[str, Any]],
    format: str | None = None,
    max_samples: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[SourceRows]:
    """Read the rows of all sources, and check the keys of each split's first row.

    Args:
        data: a file, a directory, or the name of a Hub data set (``splits.read_splits``); or
            several, mixed by weight (``sources.sources_of``).
        format: name of the formatter (``formats.FORMATS``) that the rows go through first.
        max_samples: only the first so many rows of each training split.
        columns: ``prompt``, ``completion``, … by the name of the column that has it.

    Raises:
        UserError: no such data, a line that is not JSON, a first row without the expected keys.
    """
    read = []
    for source in sources_of(data):
        splits: dict[str, NumberedRows | None] = {}
        for name, rows in read_splits(source).items():
            if rows is not None:
                limit = max_samples if name == "train" else None
                named = rows._replace(numbered=rows.numbered[:limit])
                rows = named._replace(numbered=_renamed(named, source.columns() or columns or {}))
                check_first_row(rows.numbered, rows.where, source.format or format)
            splits[name] = rows
        read.append(SourceRows(source, splits, source.format or format))
    return read


def load_data(
    data: str | Iterable[str | Mapping[str, Any]],
    tokenizer: TokenizerWrapper,
    max_seq_length: int,
    mask_prompt: bool | None,
    format: str | None = None,
    max_samples: int | None = None,
    columns: Mapping[str, str] | None = None,
    embeddings: int | None = None,
    val_split: float | None = None,
    seed: int = 0,
) -> dict[str, Split]:
    """Read and tokenize all splits: ``read_rows``, then ``tokenize_rows``."""
    rows = read_rows(data, format, max_samples, columns)
    return tokenize_rows(rows, tokenizer, max_seq_length, mask_prompt, embeddings, val_split, seed)


def tokenize_rows(
    read: Sequence[SourceRows],
    tokenizer: TokenizerWrapper,
    max_seq_length: int,
    mask_prompt: bool | None,
    embeddings: int | None = None,
    val_split: float | None = None,
    seed: int = 0,
) -> dict[str, Split]:
    """All splits as samples, mixed by weight; a split without rows is empty.

    Args:
        read: the rows.
        tokenizer: the model's.
        max_seq_length: in tokens; longer samples are cut.
        mask_prompt: None: wherever the rows have a prompt.
        embeddings: how many token ids the model has; None where that is not known.
        val_split: the share of each training split to validate on.
        seed: of what is drawn: for validation, and by weight.

    Raises:
        UserError: a row is not right, or no training row has a token to learn from (file and line
            are named, all of them up to twenty).
    """
    rows_to_samples = RowTokenizer(tokenizer, max_seq_length, mask_prompt, embeddings)
    sources = [rows.source for rows in read]
    parts = []
    for source, splits, format in read:
        part = {
            name: rows_to_samples.split(*rows, format) if rows else Split()
            for name, rows in splits.items()
        }
        if not part["train"].samples:
            raise UserError(
                f"no row of {source.path}'s training split has a token to learn from within "
                f"--max-seq-length {max_seq_length}"
            )
        parts.append(part)
    if val_split:
        for source, part in zip(sources, parts, strict=True):
            if part["valid"].samples:
                raise UserError(f"--val-split: {source.path} has a validation split already")
            part["train"], part["valid"] = split_off(part["train"], val_split, seed)
    if len(parts) == 1 and sources[0].weight == 1:
        return parts[0]
    weights = {"train": [source.weight for source in sources]}
    equal = [1.0] * len(parts)
    return {
        name: mixed([part[name] for part in parts], weights.get(name, equal), seed)
        for name in ("train", "valid", "test")
    }


def _renamed(rows: NumberedRows, columns: Mapping[str, str]) -> list[tuple[int, Any]]:
    """The rows with their columns under the names that are trained on."""
    made, faults = [], Faults(rows.where)
    for number, row in rows.numbered:
        try:
            made.append((number, renamed(row, columns)))
        except ValueError as error:
            faults.add(number, str(error))
    faults.raise_if_any()
    return made
