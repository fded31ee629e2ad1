"""What data comes down to: samples of token ids, in splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from tlora_mlx.errors import UserError


class Sample(NamedTuple):
    """One row as the model sees it.

    Attributes:
        tokens: token ids.
        first_target: the first position that counts as a target: after a masked prompt, else 1.
        row: where it comes from: its line in the file, or its row in the data set, from 1 on.
        gaps: (first, one past the last) of positions after that which do not count: what others
            say between an assistant's turns, and what the template puts after the last.
        part: which of a mixture's parts it is from (``Split.parts``).
    """

    tokens: list[int]
    first_target: int
    row: int = 0
    gaps: tuple[tuple[int, int], ...] = ()
    part: int = 0

    def cut(self, length: int) -> Sample:
        """The first tokens, so many."""
        gaps = tuple((a, min(b, length)) for a, b in self.gaps if a < length)
        return self._replace(tokens=self.tokens[:length], gaps=gaps)

    def counts(self) -> np.ndarray:
        """Which tokens count as targets: (T,) bool."""
        counts = np.arange(len(self.tokens)) >= self.first_target
        for first, stop in self.gaps:
            counts[first:stop] = False
        return counts


@dataclass(frozen=True)
class Split:
    """One split's samples, and what was done to rows that did not fit.

    Attributes:
        where: what their rows are numbered in: "DIR/train.jsonl, line".
        left_out: rows with no token to learn from: empty, or the completion was cut away whole.
        truncated: rows that were cut to the maximal length.
        warnings: about the rows or the chat template, in sentences.
        parts: of a mixture: what it is mixed of, each with its own rows; else empty.
    """

    samples: list[Sample] = field(default_factory=list)
    where: str = "row"
    left_out: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    parts: Sequence[Split] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def longest(self) -> int:
        """Tokens of the longest sample; 0 if there is none."""
        return max((len(sample.tokens) for sample in self.samples), default=0)

    def add(self, sample: Sample, max_seq_length: int) -> None:
        """Take a sample in, cut to the maximal length; one with nothing to learn is left out."""
        cut = sample.cut(max_seq_length) if len(sample.tokens) > max_seq_length else sample
        if len(cut.tokens) - cut.first_target <= sum(stop - first for first, stop in cut.gaps):
            self.left_out.append(sample.row)
            return
        if cut is not sample:
            self.truncated.append(sample.row)
        self.samples.append(cut)

    def name(self) -> str:
        """A short name of where its rows are from: "DIR/train.jsonl"."""
        where = self.where.rsplit(",", 1)[0]
        return "/".join(where.split("/")[-2:])

    def place(self, samples: Iterable[Sample]) -> str:
        """Where samples come from: "DIR/train.jsonl, line 3, 4"."""
        parts, found = self.parts or [self], []
        rows = {(sample.part, sample.row) for sample in samples}
        for number, part in enumerate(parts):
            if numbers := sorted(row for of, row in rows if of == number):
                found.append(f"{part.where} {', '.join(map(str, numbers))}")
        return "; ".join(found)


def mixed(parts: Sequence[Split], weights: Sequence[float], seed: int) -> Split:
    """Several data sets' splits as one.

    Args:
        parts: the splits.
        weights: how often each part's samples are there: 2: each of them twice; 0.5: half of them,
            drawn without replacement, one at least.
        seed: of what is drawn.

    Raises:
        ValueError: there are more or fewer weights than parts.
    """
    samples: list[Sample] = []
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        whole = int(weight)
        some = round((weight - whole) * len(part))
        if part.samples and not whole:
            some = max(some, 1)
        drawn = draw_samples(part.samples, some, seed) if some else []
        own = [*part.samples * whole, *drawn]
        samples += [sample._replace(part=number) for sample in own]
    return Split(
        samples,
        "; ".join(part.where for part in parts),
        [row for part in parts for row in part.left_out],
        [row for part in parts for row in part.truncated],
        list(dict.fromkeys(warning for part in parts for warning in part.warnings)),
        parts,
    )


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


def draw_samples(samples: Sequence[Sample], number: int, seed: int) -> Sequence[Sample]:
    """So many samples drawn at random without replacement; all of them if there are fewer."""
    if len(samples) <= number:
        return samples
    chosen = np.random.default_rng(seed).choice(len(samples), number, replace=False)
    return [samples[i] for i in sorted(chosen.tolist())]
