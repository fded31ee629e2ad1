"""The data as training would see it, looked at before any weights are loaded (``tlora check``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tlora_mlx.config.check_options import CheckCommand
from tlora_mlx.data.faults import first_numbers
from tlora_mlx.data.samples import Sample, Split
from tlora_mlx.data.splits import is_read
from tlora_mlx.errors import UserError, counted
from tlora_mlx.storage.files import user_path, write_text
from tlora_mlx.training.setup import read_data


@dataclass(frozen=True)
class SplitSummary:
    """One split in figures; of a mixture, one of its parts, as often as its weight says.

    Attributes:
        name: of the split; of a part, with the file or the data set that it is from.
        samples: how many are trained or validated on.
        tokens: of all samples together.
        counted: how many of those tokens count in the loss.
        longest: tokens of the longest sample.
        cut: rows that were cut to the maximal length.
        left_out: rows without a token that counts.
        repeated: samples that are in the training split too; of that split, more than once.
    """

    name: str
    samples: int
    tokens: int
    counted: int
    longest: int
    cut: list[int]
    left_out: list[int]
    repeated: int


@dataclass(frozen=True)
class TokenRun:
    """Tokens next to each other that are alike.

    Attributes:
        text: with special tokens spelt out.
        counts: whether they count in the loss.
        special: whether they are special tokens.
    """

    text: str
    counts: bool
    special: bool


@dataclass(frozen=True)
class DataCheck:
    """What looking at the data has shown.

    Attributes:
        summaries: of the splits that have rows.
        warnings: in sentences.
        shown: the first samples of the training split: its row, and its tokens as runs.
    """

    summaries: list[SplitSummary]
    warnings: list[str]
    shown: list[tuple[int, list[TokenRun]]]


def check(config: CheckCommand) -> DataCheck:
    """Read and tokenize the data as training would; write the samples where that is asked for.

    Args:
        config: the options. Of the model, the tokenizer and ``config.json`` are enough.

    Returns:
        Figures, warnings, and the first samples.

    Raises:
        UserError: the model has no tokenizer, there is no such data, or rows of it are not right.
        RunError: the samples cannot be written.
    """
    output = user_path(config.json) if config.json else None
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--json {output} must be a file in a directory that exists")
    if output and is_read(output, config.data):
        raise UserError(f"--json {output} is a file of the data itself; give another name")
    data, model = read_data(config)
    tokenizer = model.tokenizer
    if output:
        lines = _lines(data, tokenizer)
        write_text(output, "".join(lines))
    summaries = list(_summaries(data))
    shown = [(s.row, runs(s, tokenizer)) for s in data["train"].samples[: config.rows]]
    return DataCheck(summaries, _warnings(data, summaries, config.max_seq_length), shown)


def _summaries(data: Mapping[str, Split]) -> Iterator[SplitSummary]:
    """Each split, or each part of it, that has rows."""
    train: set[tuple[int, ...]] = set()
    for name, split in data.items():
        for number, part in enumerate(split.parts or [split]):
            samples = (
                [s for s in split.samples if s.part == number] if split.parts else part.samples
            )
            repeated = 0
            for sample in part.samples:
                repeated += tuple(sample.tokens) in train
                if name == "train":
                    train.add(tuple(sample.tokens))
            lengths = [len(sample.tokens) for sample in samples]
            if part.samples or part.left_out:
                yield SplitSummary(
                    f"{name}: {part.name()}" if split.parts else name,
                    len(samples),
                    sum(lengths),
                    sum(int(sample.counts().sum()) for sample in samples),
                    max(lengths, default=0),
                    part.truncated,
                    part.left_out,
                    repeated,
                )


def _warnings(
    data: Mapping[str, Split], summaries: list[SplitSummary], max_seq_length: int
) -> list[str]:
    """Warnings, the most serious first."""
    found = list(dict.fromkeys(w for split in data.values() for w in split.warnings))
    for summary in summaries:
        if summary.left_out:
            found.append(
                f"{summary.name}: {counted(len(summary.left_out), 'row')} left out, without a "
                f"token that counts: {_rows(summary.left_out)}"
            )
        if summary.cut:
            found.append(
                f"{summary.name}: {counted(len(summary.cut), 'row')} cut to --max-seq-length "
                f"{max_seq_length}, so that the end is lost: {_rows(summary.cut)}"
            )
        if summary.repeated and summary.name.startswith("train"):
            repeated = counted(summary.repeated, "sample")
            found.append(f"{summary.name}: {repeated} repeated within the training data")
        elif summary.repeated:
            found.append(
                f"{summary.name}: {counted(summary.repeated, 'sample')} repeated from the training "
                "data, so its loss looks better than it is"
            )
    if not data["valid"].samples:
        found.append(
            "there is no validation data, so the last adapter is kept, not the best; give "
            "valid.jsonl, or --val-split"
        )
    return found


def _rows(numbers: list[int]) -> str:
    return f"row{'' if len(numbers) == 1 else 's'} {first_numbers(numbers)}"


def _lines(data: Mapping[str, Split], tokenizer: Any) -> Iterator[str]:
    """One JSON object per sample."""
    for name, split in data.items():
        for sample in split.samples:
            line = {
                "split": name,
                "row": sample.row,
                "tokens": sample.tokens,
                "counts": sample.counts().astype(int).tolist(),
                "text": tokenizer.decode(sample.tokens),
            }
            yield json.dumps(line, ensure_ascii=False) + "\n"


def runs(sample: Sample, tokenizer: Any) -> list[TokenRun]:
    """A sample's tokens as runs of what counts and what does not, special tokens apart."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.eos_token_ids)
    kinds = [(bool(c), t in special) for t, c in zip(sample.tokens, sample.counts(), strict=True)]
    found: list[TokenRun] = []
    first = 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[first]:
            text = tokenizer.decode(sample.tokens[first:i])
            found.append(TokenRun(text, *kinds[first]))
            first = i
    return found
