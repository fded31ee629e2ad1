"""A tokenizer's chat template: what it renders, and which tokens end a turn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlora_mlx.data.conversation import Conversation, with_arguments_as_text
from tlora_mlx.errors import UserError, first_line

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class Tokenized:
    """A conversation in token ids.

    Attributes:
        tokens: as the chat template renders them.
        counts: for each token, whether it is an assistant's: of the content or the end of a turn.
        ends: what ends each assistant turn: a special token's text; empty where nothing does.
        warnings: what the template does not show, or the row lacks, in sentences that follow the
            name of the row.
    """

    tokens: list[int]
    counts: list[bool]
    ends: list[str]
    warnings: tuple[str, ...] = ()


def prompt_tokens(
    tokenizer: TokenizerWrapper, messages: Sequence[dict[str, Any]], **options: Any
) -> list[int]:
    """Token ids of a conversation as the model is asked to answer it.

    Args:
        tokenizer: mlx-lm's wrapper of a tokenizer that has a chat template.
        messages: each with ``role`` and ``content``.
        options: more arguments of the template.

    Raises:
        UserError: the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    except Exception as error:  # a chat template may raise anything
        reason = refusal(messages, error)
        raise UserError(f"the model's chat template refuses this conversation: {reason}") from None


def question_tokens(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Token ids of a text to be answered: a user's turn if there is a chat template, else as it is.

    Args:
        tokenizer: mlx-lm's wrapper of a tokenizer.
        text: what is asked; a BOS at its beginning is not doubled (mlx_lm/generate.py,
            stream_generate).

    Raises:
        UserError: the template refuses it.
    """
    if tokenizer.has_chat_template:
        return prompt_tokens(tokenizer, [{"role": "user", "content": text}])
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tokenizer.encode(text, add_special_tokens=not begins)


def refusal(messages: Iterable[Any], error: Exception) -> str:
    """What a template says, and what to do where it is the system message that it refuses."""
    said = first_line(error)
    roles = [m.get("role") for m in messages if isinstance(m, dict)]
    if "system" in roles and "system" in said.lower():
        return f"{said}; put the system message's text at the beginning of the first user message"
    return said


class Renderer:
    """A chat template.

    Args:
        tokenizer: mlx-lm's wrapper of a tokenizer that has a chat template.

    Attributes:
        tokenizer: as given.
        stops: the texts of the tokens that stop generation.
        special: matches a special token, with spaces before it; the token is the first group.
        marks_turns: whether it says itself what an assistant generates (``{% generation %}``).
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        self.tokenizer = tokenizer
        plain = tokenizer._tokenizer
        template = plain.chat_template
        text = template if isinstance(template, str) else "".join((template or {}).values())
        marks = re.search(r"\{%-?\s*generation\s*-?%\}", text)
        self.marks_turns = bool(marks) and plain.is_fast  # others cannot say where the marks are
        added = plain.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | set(plain.all_special_tokens)
        stops = plain.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
        self.stops = {token for token in stops if token}
        names = sorted(special | self.stops, key=len, reverse=True)
        self.special = re.compile(rf"\s*({'|'.join(map(re.escape, names))})")

    def render(self, conversation: Conversation, prompt: bool = False) -> str:
        """The conversation as text; with ``prompt``, as the model is asked to answer it.

        Templates that put the arguments of tool calls together with texts (DeepSeek V3's) get them
        as JSON.
        """
        options = {
            "tools": conversation.tools,
            "tokenize": False,
            "add_generation_prompt": prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(conversation.messages, **options)
        except TypeError:
            if not any(message.get("tool_calls") for message in conversation.messages):
                raise
            messages = with_arguments_as_text(conversation.messages)
            return self.tokenizer.apply_chat_template(messages, **options)
