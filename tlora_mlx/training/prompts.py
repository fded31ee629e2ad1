"""Answers to the same few prompts at every validation, so that a run can be watched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.nn as nn

from tlora_mlx.data.chat_template import prompt_tokens
from tlora_mlx.errors import UserError
from tlora_mlx.storage.files import user_path
from tlora_mlx.storage.foreign import read_file

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

MAX_TOKENS = 100


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


def answers(
    model: nn.Module, tokenizer: TokenizerWrapper, prompts: Sequence[str]
) -> list[dict[str, str]]:
    """Each prompt with the model's answer, greedy, up to ``MAX_TOKENS`` tokens.

    Args:
        model: in evaluation mode.
        tokenizer: its chat template is used if there is one.
        prompts: from ``read_prompts``.

    Raises:
        UserError: the chat template refuses one.
    """
    from mlx_lm.generate import generate

    found = []
    for text in prompts:
        prompt: str | list[int] = text
        if tokenizer.has_chat_template:
            turn = [{"role": "user", "content": text}]
            prompt = prompt_tokens(tokenizer, turn)
        answer = generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS)
        found.append({"prompt": text, "answer": answer})
    return found
