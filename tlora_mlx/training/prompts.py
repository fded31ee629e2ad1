"""Answers to the same few prompts at every validation, so that a run can be watched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.nn as nn

from tlora_mlx.data.chat_template import question_tokens
from tlora_mlx.errors import UserError
from tlora_mlx.storage.files import user_path
from tlora_mlx.storage.foreign import read_file

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from tlora_mlx.models.base_model import BaseModel

MAX_TOKENS = 100


class Prompt(NamedTuple):
    """A line of the file.

    Attributes:
        text: as it stands there.
        tokens: as the model is asked it, in the chat template if there is one.
        room: how many tokens the answer may have.
    """

    text: str
    tokens: list[int]
    room: int


def read_prompts(file: str | None) -> list[str]:
    """The prompts of ``--sample-prompts``, one per line; none without a file.

    Raises:
        UserError: it cannot be read, or has no prompt.
    """
    if file is None:
        return []
    try:
        lines = read_file(user_path(file)).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"--sample-prompts {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--sample-prompts {file} is not UTF-8 text; convert it first") from None
    if prompts := [line for line in lines if line.strip()]:
        return prompts
    raise UserError(f"--sample-prompts {file} has no prompt; write one per line")


def tokenize_prompts(texts: Sequence[str], base: BaseModel) -> list[Prompt]:
    """The prompts as the model is asked them.

    Args:
        texts: from ``read_prompts``.
        base: its chat template is used if there is one.

    Raises:
        UserError: the chat template refuses one, or it is too long for the model's positions.
    """
    found = []
    for number, text in enumerate(texts, 1):
        try:
            tokens = question_tokens(base.tokenizer, text)
            found.append(Prompt(text, tokens, base.room(len(tokens), MAX_TOKENS)))
        except UserError as error:
            raise UserError(f"--sample-prompts, prompt {number}: {error}") from None
    return found


def answers(
    model: nn.Module, tokenizer: TokenizerWrapper, prompts: Sequence[Prompt]
) -> list[dict[str, str]]:
    """Each prompt with the model's answer, greedy.

    Args:
        model: in evaluation mode.
        tokenizer: the prompts were made with it.
        prompts: from ``tokenize_prompts``.
    """
    from mlx_lm.generate import generate

    return [
        {
            "prompt": prompt.text,
            "answer": generate(model, tokenizer, prompt.tokens, max_tokens=prompt.room),
        }
        for prompt in prompts
    ]
