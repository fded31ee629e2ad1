"""Samples in batches: padded to few widths, ordered by length, shared out to processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from tlora_mlx.data.samples import Sample
from tlora_mlx.distributed.collectives import share
from tlora_mlx.method.batch import Batch

# Lengths are padded to multiples of so much, so that mx.compile sees few shapes: an eighth of the
# power of two below, within these bounds. mlx-lm pads by 32, a third of a sample of 100 tokens.
PAD_TO = (8, 32)

# Batches of like length are cut from shuffled windows of so many batches.
WINDOW = 64


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
    counts = np.zeros((len(samples), width), np.bool_)
    for row, sample in zip(counts, samples, strict=True):
        row[: len(sample.tokens)] = sample.counts()
    lengths = np.array([len(sample.tokens) for sample in samples], np.int32)
    return Batch(mx.array(tokens), mx.array(counts), mx.array(lengths))


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
