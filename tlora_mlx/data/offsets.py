"""Which characters of a text each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class NotLocatedError(ValueError):
    """A turn's place in the rendered conversation is not certain."""


def encode_with_offsets(
    tokenizer: TokenizerWrapper, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text without special tokens added, and each one's range of characters.

    Tokenizers that do not know the ranges (those that are not "fast") are asked for the text of
    more and more tokens; those of one character have its range.

    Raises:
        NotLocatedError: the tokens do not decode to the text.
    """
    plain = tokenizer._tokenizer
    if getattr(plain, "is_fast", False):
        made = plain(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(made["input_ids"]), list(made["offset_mapping"])
    tokens = plain.encode(text, add_special_tokens=False)
    edge, ranges, waiting = 0, [], 0
    for number in range(1, len(tokens) + 1):
        waiting += 1
        decoded = plain.decode(tokens[:number], clean_up_tokenization_spaces=False)
        if text.startswith(decoded):
            ranges += [(edge, len(decoded))] * waiting
            edge, waiting = len(decoded), 0
    if edge != len(text) or waiting:
        raise NotLocatedError("the tokenizer does not say which characters its tokens are")
    return tokens, ranges


def intervals(counts: Sequence[bool]) -> list[tuple[int, int]]:
    """The runs of True as (first, one past the last)."""
    edges = [i for i, (a, b) in enumerate(pairwise([False, *counts, False])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def is_within(token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token has characters of a span.

    Tokenizers that leave spaces out of the ranges (``trim_offsets``) give tokens of spaces none;
    such a token counts if the span continues on both sides.
    """
    (first, last), (start, stop) = token, span
    return start < first < stop if first == last else first < stop and last > start
