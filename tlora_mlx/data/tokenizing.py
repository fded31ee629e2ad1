"""Rows as samples: which keys they have, the chat template, and where what is learnt begins."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import create_dataset

from tlora_mlx.data.formats import to_prompt
from tlora_mlx.data.samples import Sample, Split
from tlora_mlx.errors import UserError, first_line


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
