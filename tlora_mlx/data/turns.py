"""What counts in a rendered conversation: each assistant turn, and the token that ends it.

A chat template is a program, and where an answer begins cannot be told from the length of the
prompt: templates trim, drop the thinking of earlier turns, add empty thinking blocks, and end their
generation prompt in what the finished conversation lacks. So a turn's place is found in the
rendered text itself. The conversation is rendered again with other content in that turn; what
differs is where its content is. Templates that mark the turns themselves (``{% generation %}``) are
taken at their word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tlora_mlx.data.conversation import REASONING_FIELDS, Conversation

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# A thinking block without thoughts, or what is left of one that the generation prompt opened.
_OPEN, _CLOSE = r"(?:<think>|<thinking>|\[THINK\])", r"(?:</think>|</thinking>|\[/THINK\])"
_EMPTY_THINKING = re.compile(rf"\s*{_OPEN}?\s*{_CLOSE}\s*")
# What generation prompts end in that finished turns may lack: such a block, open or empty, or an
# empty channel (Gemma 4).
_PROMPT_ENDS = re.compile(rf"(?:{_OPEN}\s*{_CLOSE}?|<\|channel>\w*\s*<channel\|>)\s*$")
_THINKING_ENDS = ("</think>", "</thinking>", "[/THINK]")


class NotLocatedError(ValueError):
    """A turn's place in the rendered conversation is not certain."""


@dataclass(frozen=True)
class Tokenized:
    """A conversation in token ids.

    Attributes:
        tokens: as the chat template renders them.
        counts: for each token, whether it is an assistant's: of the content or the end of a turn.
        ends: what ends each assistant turn: a special token's text; empty where nothing does.
    """

    tokens: list[int]
    counts: list[bool]
    ends: list[str]


class ChatTemplate:
    """A tokenizer's chat template, as something that finds the assistant's turns.

    Args:
        tokenizer: mlx-lm's wrapper of a tokenizer that has a chat template.
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        plain = tokenizer._tokenizer
        template = plain.chat_template
        text = template if isinstance(template, str) else "".join((template or {}).values())
        self._marks_turns = bool(re.search(r"\{%-?\s*generation\s*-?%\}", text))
        added = plain.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | set(plain.all_special_tokens)
        stops = plain.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
        self.stops = {token for token in stops if token}
        names = sorted(special | self.stops, key=len, reverse=True)
        self._special = re.compile(rf"\s*({'|'.join(map(re.escape, names))})")

    def render(self, conversation: Conversation, prompt: bool = False) -> str:
        """The conversation as text; with ``prompt``, as the model is asked to answer it."""
        return self._tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=prompt,
        )

    def tokenize(self, conversation: Conversation) -> Tokenized:
        """Token ids, and which of them count.

        Raises:
            NotLocatedError: it is not certain where a turn is.
            Exception: whatever the template raises.
        """
        if self._marks_turns:
            return self._by_marks(conversation)
        text = self.render(conversation)
        places = [
            self._locate(conversation, text, number)
            for number, message in enumerate(conversation.messages)
            if message["role"] == "assistant"
        ]
        for (_, before, _), (after, _, _) in pairwise(places):
            if after < before:
                raise NotLocatedError("two assistant turns overlap in the rendered conversation")
        tokens, offsets = encode_with_offsets(self._tokenizer, text)
        counts = [
            any(first < stop and last > start for start, stop, _ in places) and last > first
            for first, last in offsets
        ]
        return Tokenized(tokens, counts, [end for _, _, end in places])

    def _by_marks(self, conversation: Conversation) -> Tokenized:
        """By the template's own ``{% generation %}``."""
        made = self._tokenizer._tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens, counts = list(made["input_ids"]), [bool(m) for m in made["assistant_masks"]]
        names = self._tokenizer._tokenizer.convert_ids_to_tokens(tokens)
        last = [n for n, after in zip(range(len(counts)), [*counts[1:], False], strict=True)
                if counts[n] and not after]  # fmt: skip
        special = self._special
        return Tokenized(
            tokens, counts, [names[n] if special.match(names[n]) else "" for n in last]
        )

    def _locate(self, conversation: Conversation, text: str, number: int) -> tuple[int, int, str]:
        """Where a turn's content begins, where its end token ends, and that token's text."""
        message = conversation.messages[number]
        reasoned = any(message.get(field) for field in REASONING_FIELDS) or any(
            end in message["content"] for end in _THINKING_ENDS
        )
        first, last = self._content(conversation, text, number)
        if message.get("tool_calls") or reasoned:
            asked = self._asked(conversation, number)
            prompts = (asked, _PROMPT_ENDS.sub("", asked))
            prompt = next((prompt for prompt in prompts if text.startswith(prompt)), None)
            if prompt is not None:
                first = len(prompt)
            elif message.get("tool_calls") or _is_rendered(message, text[:first]):
                raise NotLocatedError(
                    "the conversation does not begin with the prompt that the turn answers, and "
                    "the turn has more than content"
                )
            if not reasoned and (empty := _EMPTY_THINKING.match(text, first)):
                first = empty.end()
        return first, *self._end(conversation, text, number, last)

    def _asked(self, conversation: Conversation, number: int) -> str:
        """The prompt that the turn answers."""
        before = conversation._replace(messages=conversation.messages[:number])
        return self.render(before, prompt=True) if number else ""

    def _content(self, conversation: Conversation, text: str, number: int) -> tuple[int, int]:
        """What differs in the rendered text when the turn's content is another."""
        message = conversation.messages[number]
        calls = message.get("tool_calls")
        first, last = _differing(text, self._with(conversation, number, message["content"]))
        if calls:  # the last call ends the turn
            name = calls[-1].get("function", calls[-1])["name"]
            changed = _stand_in(name)
            call = {"name": changed, "arguments": {changed: changed}}
            call = {**calls[-1], "function": call} if "function" in calls[-1] else call
            other = {**message, "tool_calls": [*calls[:-1], call]}
            _, last = _differing(text, self._replaced(conversation, number, other))
            return first, last
        found, meant = ("".join(t.split()) for t in (text[first:last], message["content"]))
        if found not in meant or (meant and not found):
            raise NotLocatedError("the template rewrites what the assistant says")
        return first, last

    def _with(self, conversation: Conversation, number: int, content: str) -> str:
        other = {**conversation.messages[number], "content": _stand_in(content)}
        return self._replaced(conversation, number, other)

    def _replaced(self, conversation: Conversation, number: int, message: dict[str, Any]) -> str:
        messages = list(conversation.messages)
        messages[number] = message
        return self.render(conversation._replace(messages=messages))

    def _end(
        self, conversation: Conversation, text: str, number: int, last: int
    ) -> tuple[int, str]:
        """Where the turn whose content stops at ``last`` ends, and the special token that ends it.

        Where no special token does, the turn ends with what the template puts after the content.
        """
        until = self._rendered_length(conversation, text, number)
        directly = self._special.match(text, last)
        if directly and (directly[1] in self.stops or until is None or directly.end() <= until):
            return directly.end(), directly[1]
        bound = self._next_content(conversation, text, number) if until is None else until
        for token in self._special.finditer(text, last, bound):
            if token[1] in self.stops:
                return token.end(), token[1]
        if until is None:
            raise NotLocatedError("the template rewrites the turn, and no end token follows it")
        return until, ""

    def _next_content(self, conversation: Conversation, text: str, number: int) -> int:
        """Where the next message's content begins."""
        content = conversation.messages[number + 1]["content"]
        return _differing(text, self._with(conversation, number + 1, content))[0]

    def _rendered_length(self, conversation: Conversation, text: str, number: int) -> int | None:
        """Where the conversation stands after the turn; None where the template rewrites it."""
        if number == len(conversation.messages) - 1:
            return len(text)
        until = self.render(conversation._replace(messages=conversation.messages[: number + 1]))
        return len(until) if text.startswith(until) else None


def _is_rendered(message: dict[str, Any], text: str) -> bool:
    """Whether a message's reasoning is part of a text."""
    thoughts = [message[field] for field in REASONING_FIELDS if isinstance(message.get(field), str)]
    for end in _THINKING_ENDS:
        before, found, _ = message["content"].partition(end)
        if found:
            thoughts.append(re.sub(r"^\s*(<think>|<thinking>|\[THINK\])", "", before))
    return any(thought.strip() and thought.strip() in text for thought in thoughts)


def _stand_in(text: str) -> str:
    """A text that begins and ends with other characters than this one, with or without spaces."""
    used = {*text[:1], *text[-1:], *text.strip()[:1], *text.strip()[-1:]}
    first, last = [letter for letter in "QXZJKW" if letter not in used][:2]
    return f"{first}tlora{last}"


def _differing(text: str, other: str) -> tuple[int, int]:
    """The range of ``text`` that is not as in ``other``, between what both begin and end with."""
    first = _shared(text, other)
    return first, len(text) - _shared(text[first:][::-1], other[first:][::-1])


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


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
