"""Rows to token ids to batches; the formats and chat templates are mlx-lm's."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import create_dataset

from tlora_mlx.errors import UserError, first_line
from tlora_mlx.files import user_path
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.distributed import share
from tlora_mlx.training.formats import to_prompt

# Lengths are padded to multiples of so much, so that mx.compile sees few shapes: an eighth of the
# power of two below, within these bounds. mlx-lm pads by 32, a third of a sample of 100 tokens.
PAD_TO = (8, 32)
# Batches of like length are cut from shuffled windows of so many batches.
WINDOW = 64


class Sample(NamedTuple):
    """One row as the model sees it.

    Attributes:
        tokens: token ids.
        first_target: the first position that counts as a target: after a masked prompt, else 1.
        row: where it comes from: its line in the file, or its row in the data set, from 1 on.
    """

    tokens: list[int]
    first_target: int
    row: int = 0


@dataclass(frozen=True)
class Split:
    """One split's samples, and what was done to rows that did not fit.

    Attributes:
        left_out: rows with no token to learn from: empty, or the completion was cut away whole.
        truncated: samples that were cut to the maximal length.
        where: what their rows are numbered in: "DIR/train.jsonl, line".
    """

    samples: list[Sample] = field(default_factory=list)
    left_out: int = 0
    truncated: int = 0
    where: str = "row"

    def __len__(self) -> int:
        return len(self.samples)


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


def split_off(train: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Training and validation samples, drawn from ``train`` without replacement; at least one each.

    Raises:
        UserError: there are not two samples.
    """
    if len(train) < 2:
        raise UserError("--val-split needs at least two training samples")
    number = min(max(1, round(share * len(train))), len(train) - 1)
    chosen = set(np.random.default_rng(seed).choice(len(train), number, replace=False).tolist())
    parts = [[], []]
    for i, sample in enumerate(train.samples):
        parts[i in chosen].append(sample)
    return replace(train, samples=parts[0]), Split(parts[1], where=train.where)


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
    if data.startswith((".", "/", "~")) or data.count("/") > 1 or data.endswith("/"):
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


def tokenize(
    rows: list[tuple[int, Any]],
    where: str,
    tokenizer: TokenizerWrapper,
    max_seq_length: int,
    mask_prompt: bool | None,
    format: str | None = None,
) -> Split:
    """All rows of a split as samples; the first row decides on the format, as in mlx-lm.

    Raises:
        UserError: a row is not right; it is named.
    """
    if format:
        rows = [
            (number, _formatted(format, row, f"{where} {number}", tokenizer))
            for number, row in rows
        ]
    for number, row in rows:
        _check_row(row, rows[0][1], f"{where} {number}")
    has_prompt = "text" not in _format_keys(rows[0][1])
    if mask_prompt and not has_prompt:
        raise UserError("--mask-prompt needs rows with a prompt; rows with 'text' have none")
    mask_prompt = has_prompt if mask_prompt is None else mask_prompt
    process = _processor(rows[0][1], tokenizer, mask_prompt)
    samples, left_out, truncated = [], 0, 0
    for number, row in rows:
        try:
            tokens, offset = process(row)
        except UserError:
            raise
        except Exception as error:  # a chat template may raise anything
            raise UserError(f"{where} {number} cannot be tokenized: {first_line(error)}") from None
        sample = Sample(tokens[:max_seq_length], max(offset, 1), number)
        if len(sample.tokens) <= sample.first_target:
            left_out += 1
            continue
        truncated += len(tokens) > max_seq_length
        samples.append(sample)
    return Split(samples, left_out, truncated, where)


def _formatted(format: str, row: Any, where: str, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    try:
        return to_prompt(format, row, tokenizer.has_chat_template)
    except ValueError as error:
        raise UserError(f"{where} is no row for --format {format}: {error}") from None


# The keys of each format, in the order in which mlx-lm's create_dataset looks for them.
_FORMATS = (("prompt", "completion"), ("messages",), ("text",))


def _format_keys(row: dict[str, Any]) -> tuple[str, ...]:
    return next((keys for keys in _FORMATS if all(k in row for k in keys)), ())


def _check_row(row: Any, first: Any, where: str) -> None:
    """Raise a UserError unless ``row`` has the keys of the first row's format, well filled."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object")
    found = ", ".join(repr(str(k)) for k in row) or "nothing"
    keys = _format_keys(first) if isinstance(first, dict) else ()
    if not keys:
        raise UserError(
            f"{where} has {found}; it needs 'text', or 'prompt' and 'completion', or 'messages', "
            "or a --format"
        )
    for key in keys:
        kind, name = (list, "a list") if key == "messages" else (str, "a text")
        if key not in row:
            raise UserError(f"{where} has no '{key}' (it has {found}), but the first row has it")
        if not isinstance(row[key], kind):
            raise UserError(f"{where}: '{key}' is not {name} but {json.dumps(row[key])[:40]}")
    if keys == ("messages",) and not (
        row["messages"] and all(isinstance(m, dict) and "role" in m for m in row["messages"])
    ):
        raise UserError(f"{where}: 'messages' is not a list of objects with 'role' and 'content'")


def _processor(row: dict[str, Any], tokenizer: TokenizerWrapper, mask_prompt: bool):
    """The function that makes (token ids, prompt length) of a row of this row's format."""
    keys = _format_keys(row)
    if keys == ("prompt", "completion") and not tokenizer.has_chat_template:
        return lambda row: _join(row, tokenizer, mask_prompt)
    if keys == ("text",):
        process = create_dataset([row], tokenizer, SimpleNamespace(mask_prompt=False)).process
        return lambda row: process(row) if row["text"] else ([], 0)
    if not tokenizer.has_chat_template:
        raise UserError(
            "rows with 'messages' need a tokenizer with a chat template, and the model has none; "
            "use rows with 'prompt' and 'completion' or a chat model"
        )
    return create_dataset([row], tokenizer, SimpleNamespace(mask_prompt=mask_prompt)).process


def _join(
    row: dict[str, Any], tokenizer: TokenizerWrapper, mask_prompt: bool
) -> tuple[list[int], int]:
    """Prompt, completion and end token, where there is no chat template (mlx-lm raises there).

    The two are tokenized apart, as they are when the model is asked: the prompt alone, and what
    follows grows token by token.
    """
    end = tokenizer.eos_token_id
    prompt = tokenizer.encode(row["prompt"])
    if prompt and prompt[-1] == end:
        prompt = prompt[:-1]
    completion = tokenizer.encode(row["completion"], add_special_tokens=False)
    tokens = prompt + completion + ([] if end is None else [end])
    return tokens, len(prompt) if mask_prompt else 0


def padded_length(length: int) -> int:
    """``length`` rounded up so that there are few of them and little is padded."""
    step = min(max(1 << max(length.bit_length() - 4, 0), PAD_TO[0]), PAD_TO[1])
    return -(-length // step) * step


def collate(samples: Sequence[Sample], max_seq_length: int) -> Batch:
    """Pad samples to one length: ``max_seq_length``, or one more than a ``padded_length``.

    One more, since the last token is only a target.
    """
    longest = max(len(sample.tokens) for sample in samples)
    width = min(1 + padded_length(longest - 1), max(max_seq_length, longest))
    tokens = np.zeros((len(samples), width), np.int32)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample.tokens)] = sample.tokens
    spans = np.array([(s.first_target, len(s.tokens)) for s in samples], np.int32)
    return Batch(mx.array(tokens), mx.array(spans))


def batches_in_order(
    samples: Sequence[Sample], batch_size: int, max_seq_length: int
) -> Iterator[Batch | None]:
    """Every sample once, by length, so that little is padded; for calibration and evaluation.

    Under ``mlx.launch`` each batch is shared out; None where this process has no part in it.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].tokens))
    for start in range(0, len(order), batch_size):
        part = share([samples[i] for i in order[start : start + batch_size]])
        yield collate(part, max_seq_length) if part else None


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as sample numbers: a function of its arguments alone.

    Every sample comes exactly once, the last partial batch included. Samples are shuffled, cut
    into windows of ``WINDOW`` batches, sorted by length in each window, cut into batches, and the
    batches shuffled.
    """
    random = np.random.default_rng((seed, epoch))
    shuffled = random.permutation(len(lengths))
    window = WINDOW * batch_size
    batches = []
    for start in range(0, len(shuffled), window):
        group = sorted(shuffled[start : start + window].tolist(), key=lengths.__getitem__)
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]
