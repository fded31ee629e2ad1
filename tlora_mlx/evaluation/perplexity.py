"""Perplexity: exp of the mean loss per counted token, on rows like those for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tlora_mlx.data.tokenizing import RowTokenizer
from tlora_mlx.errors import UserError
from tlora_mlx.evaluation.rows import Row
from tlora_mlx.evaluation.subject import Subject, sample_losses


def read(
    rows: Sequence[Row], subject: Subject, max_seq_length: int, mask_prompt: bool | None
) -> list[dict[str, Any]]:
    """Each row's sample, made as for training with this run's options.

    Raises:
        UserError: a row is invalid, or no row has a token to predict.
    """
    where = rows[0].where.rsplit(" ", 1)[0]
    numbered = [(row.number, row.columns) for row in rows]
    length = subject.base.room(0, max_seq_length)
    tokenizer = RowTokenizer(subject.base.tokenizer, length, mask_prompt)
    split = tokenizer.split(numbered, where, subject.format)
    if not split.samples:
        raise UserError(f"no row of {where.rsplit(',', 1)[0]} has a token to predict")
    return [{"row": sample.row, "sample": sample} for sample in split.samples]


def respond(subject: Subject, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sample's summed loss, in nats, and the number of tokens that it covers."""
    with subject.observer.stage(f"{subject.title} reads", len(items)) as advance:
        losses = sample_losses(
            subject.base.model, [item["sample"] for item in items], subject.batch_size, advance
        )
    return [{"loss": loss, "tokens": tokens} for loss, tokens in losses]


def metrics(
    items: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """``loss``, in nats per token, and ``perplexity``; None if they are not finite."""
    loss = sum(output["loss"] for output in outputs) / sum(output["tokens"] for output in outputs)
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp of more overflows
    return {
        name: value if math.isfinite(value) else None
        for name, value in (("loss", loss), ("perplexity", perplexity))
    }
