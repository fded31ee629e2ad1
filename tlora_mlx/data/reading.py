"""Rows of data from files and from the Hugging Face Hub, and all splits of them as samples."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora_mlx.data.samples import Split
from tlora_mlx.data.tokenizing import tokenize
from tlora_mlx.errors import UserError, first_line
from tlora_mlx.storage.files import user_path
from tlora_mlx.storage.hub_names import can_be_repository

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def load_data(
    data: str,
    tokenizer: TokenizerWrapper,
    max_seq_length: int,
    mask_prompt: bool | None,
    format: str | None = None,
    max_samples: int | None = None,
) -> dict[str, Split]:
    """Read and tokenize all splits; a split without a file is empty.

    Args:
        data: a directory with ``train.jsonl`` and maybe ``valid.jsonl`` (or ``validation.jsonl``)
            and ``test.jsonl``, or the name of a Hub data set with splits of these names; a
            configuration of it follows after a colon.
        tokenizer: the model's.
        max_seq_length: in tokens; longer samples are cut.
        mask_prompt: None: wherever the rows have a prompt.
        format: name of the formatter (``formats.FORMATS``) that the rows go through first.
        max_samples: only the first so many rows of the training split.

    Raises:
        UserError: no such data, a line that is not JSON, a row without the expected keys, a split
            or a training set without rows (file and line are named).
    """
    path = user_path(data)
    if path.is_dir():
        names = _split_names(path, [p.stem for p in path.glob("*.jsonl")])
        rows = {split: read_jsonl(path / f"{name}.jsonl") for split, name in names.items()}
        where = {split: f"{path / name}.jsonl, line" for split, name in names.items()}
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
        tokenized[split] = (
            Split()
            if numbered is None
            else tokenize(numbered, where[split], tokenizer, max_seq_length, mask_prompt, format)
        )
    if not tokenized["train"].samples:
        raise UserError(
            f"no row of {data}'s training split has a token to learn from within "
            f"--max-seq-length {max_seq_length}"
        )
    return tokenized


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
    rows = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append((number, json.loads(line)))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of absurd length
        raise UserError(f"{path}, line {number} is not valid JSON: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
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
        raise UserError(f"data directory {data} does not exist")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"data {data} is no directory here, and a Hub data set needs the package 'datasets': "
            "pip install datasets"
        ) from None
    try:
        dataset = load_dataset(*data.split(":", 1))
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
            rows.append((number, {**row, **named}))
    return rows or None
