"""Which characters of a text each token stands for, and which differ in another text."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    flags, found, stop = bytes([*counts, False]), [], 0
    while (start := flags.find(1, stop)) >= 0:
        stop = flags.find(0, start)
        found.append((start, stop))
    return found


def inside(tokens: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token's range of characters, whether it has some of a span.

    Tokenizers that leave spaces out of the ranges (``trim_offsets``) give tokens of spaces none;
    such a token counts if the span continues on both sides.

    Args:
        tokens: the ranges, in order.
        spans: (first, one past the last) character, in order, without overlaps.
    """
    found, at = [], 0
    for first, last in tokens:
        while at < len(spans) and spans[at][1] <= first:
            at += 1
        found.append(at < len(spans) and last > spans[at][0])
    return found


def differing(text: str, other: str) -> tuple[int, int]:
    """The range of ``text`` that is not as in ``other``, between what both begin and end with."""
    first = _shared(text, other)
    return first, len(text) - _shared(text[first:][::-1], other[first:][::-1])


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def stand_in(text: str) -> str:
    """A text that begins and ends with other characters than this one, with or without spaces."""
    used = {*text[:1], *text[-1:], *text.strip()[:1], *text.strip()[-1:]}
    first, last = [letter for letter in "QXZJKW" if letter not in used][:2]
    return f"{first}tlora{last}"


def places_of(
    texts: Sequence[str], whole: str, names: Sequence[str], other: str
) -> list[tuple[int, int]]:
    """Where texts are in ``whole``, which is ``other`` but for the names that stand for them there.

    Args:
        texts: in their order; the spaces around them may be missing in ``whole``.
        whole: with the texts.
        names: one for each text, none of them within another.
        other: with the names.

    Returns:
        Ranges of characters of ``whole``; none if the two do not agree in all the rest.
    """
    between = re.split("|".join(map(re.escape, names)), other) if names else []
    if len(between) != len(names) + 1 or not whole.startswith(between[0]):
        return []
    places, at = [], len(between[0])
    for text, behind in zip(texts, between[1:], strict=True):
        for form in (text, text.lstrip(), text.rstrip(), text.strip()):
            stop = at + len(form)
            if whole.startswith(form, at) and whole.startswith(behind, stop):
                places.append((at, stop))
                at = stop + len(behind)
                break
        else:
            return []
    return places if at == len(whole) else []
