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
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tlora_mlx.data.conversation import (
    Conversation,
    function_of,
    hidden_reasoning,
    thoughts_of,
    with_arguments_as_text,
    with_function,
)
from tlora_mlx.data.offsets import NotLocatedError, encode_with_offsets, intervals, is_within

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# A thinking block without thoughts, or what is left of one that the generation prompt opened.
_OPEN, _CLOSE = r"(?:<think>|<thinking>|\[THINK\])", r"(?:</think>|</thinking>|\[/THINK\])"
_EMPTY_THINKING = re.compile(rf"(\s*{_OPEN}?\s*{_CLOSE})\s*")
# What generation prompts end in that finished turns may lack: such a block, open or empty, or an
# empty channel (Gemma 4).
_PROMPT_ENDS = re.compile(rf"(?:{_OPEN}\s*{_CLOSE}?|<\|channel>\w*\s*<channel\|>)\s*$")


@dataclass(frozen=True)
class Tokenized:
    """A conversation in token ids.

    Attributes:
        tokens: as the chat template renders them.
        counts: for each token, whether it is an assistant's: of the content or the end of a turn.
        ends: what ends each assistant turn: a special token's text; empty where nothing does.
        hidden: the fields with reasoning that the template does not show.
    """

    tokens: list[int]
    counts: list[bool]
    ends: list[str]
    hidden: tuple[str, ...] = ()


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
            return self._tokenizer.apply_chat_template(conversation.messages, **options)
        except TypeError:
            if not any(message.get("tool_calls") for message in conversation.messages):
                raise
            messages = with_arguments_as_text(conversation.messages)
            return self._tokenizer.apply_chat_template(messages, **options)

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
            any(is_within(token, (start, stop)) for start, stop, _ in places) for token in offsets
        ]
        hidden = hidden_reasoning(conversation.messages, text)
        return Tokenized(tokens, counts, [end for _, _, end in places], hidden)

    def _by_marks(self, conversation: Conversation) -> Tokenized:
        """By the template's own ``{% generation %}``.

        Where it marks the content alone, the token that ends the turn counts too: without it the
        model would not learn to stop.
        """
        text = self.render(conversation)
        for number, message in enumerate(conversation.messages):
            if message.get("tool_calls"):
                self._content(conversation, text, number)  # which refuses calls that are not shown
        made = self._tokenizer._tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens, counts = list(made["input_ids"]), [bool(m) for m in made["assistant_masks"]]
        names = self._tokenizer._tokenizer.convert_ids_to_tokens(tokens)
        texts = [self._tokenizer.decode([token]) for token in tokens]
        ends = []
        for start, stop in intervals(counts):
            last = stop - 1
            while last > start and not texts[last].strip():
                last -= 1
            if self._special.match(names[last]):
                ends.append(names[last])
            elif stop < len(tokens) and self._special.match(names[stop]):
                counts[stop] = True
                ends.append(names[stop])
            else:
                ends.append("")
        return Tokenized(tokens, counts, ends, hidden_reasoning(conversation.messages, text))

    def _locate(self, conversation: Conversation, text: str, number: int) -> tuple[int, int, str]:
        """Where a turn's content begins, where its end token ends, and that token's text."""
        message = conversation.messages[number]
        first, last = self._content(conversation, text, number)
        if message.get("tool_calls") or thoughts_of(message):
            content = first
            asked = self._asked(conversation, number)
            prompts = (asked, _PROMPT_ENDS.sub("", asked))
            first = next((len(prompt) for prompt in prompts if text.startswith(prompt)), -1)
            if first < 0 or not asked:
                first = self._first_without_prompt(conversation, text, number, content)
            empty = _EMPTY_THINKING.match(text, first)
            if empty and empty.end(1) <= content:
                first = min(empty.end(), content)
        return first, *self._end(conversation, text, number, last)

    def _first_without_prompt(
        self, conversation: Conversation, text: str, number: int, content: int
    ) -> int:
        """Where a turn that is more than content begins, if the prompt before it was rewritten.

        Templates may drop the thinking of earlier steps once another question follows (Qwen3), or
        show the tools before the last question (Mistral). If no thoughts are rendered, a turn
        without calls begins with its content, and one with calls begins where content alone would.

        Args:
            conversation: as given.
            text: all of it, rendered.
            number: of the turn.
            content: where the content is in the text.

        Raises:
            NotLocatedError: thoughts are rendered, or content alone would not stand there.
        """
        messages, first, located = conversation.messages, content, True
        if messages[number].get("tool_calls"):
            # The results of the calls are left out: templates refuse results without calls.
            later = range(number + 1, len(messages))
            rest = next((i for i in later if messages[i]["role"] == "user"), len(messages))
            plain = {"role": "assistant", "content": _stand_in("")}
            others = [*messages[:number], plain, *messages[rest:]]
            other = self.render(conversation._replace(messages=others))
            first, _ = _differing(text, other)
            located = other[first:].lstrip().startswith(plain["content"])
        if not located or any(t and t in text[:first] for t in thoughts_of(messages[number])):
            raise NotLocatedError(
                "the conversation does not begin with the prompt that the turn answers, and the "
                "turn has more than content"
            )
        return first

    def _asked(self, conversation: Conversation, number: int) -> str:
        """The prompt that the turn answers; empty where none comes before it."""
        before = conversation._replace(messages=conversation.messages[:number])
        return self.render(before, prompt=True) if number else ""

    def _content(self, conversation: Conversation, text: str, number: int) -> tuple[int, int]:
        """What differs in the rendered text when the turn's content is another."""
        message = conversation.messages[number]
        calls = message.get("tool_calls")
        first, last = _differing(text, self._with(conversation, number, message["content"]))
        if calls:  # the last call ends the turn
            changed = _stand_in(function_of(calls[-1])["name"])
            call = with_function(calls[-1], {"name": changed, "arguments": {changed: changed}})
            other = {**message, "tool_calls": [*calls[:-1], call]}
            other = self._replaced(conversation, number, other)
            if other == text:
                raise NotLocatedError("the template does not show tool_calls")
            return first, _differing(text, other)[1]
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
        directly = self._special.match(text, last)
        if directly and directly[1] in self.stops:
            return directly.end(), directly[1]
        until = self._rendered_length(conversation, text, number)
        bound = self._next_content(conversation, text, number) if until is None else until
        found = list(self._special.finditer(text, last, bound))
        # Tokens in a row (Command R7B's <|END_RESPONSE|><|END_OF_TURN_TOKEN|>) end it together.
        for token in found:
            if token[1] in self.stops:
                return token.end(), token[1]
        # If the end of the turn is not known, a single token may belong to the next message.
        if directly and directly.end() <= bound and (until is not None or len(found) > 1):
            return directly.end(), directly[1]
        if until is None:
            raise NotLocatedError("the template rewrites the turn, and no end token follows it")
        behind = self._special.match(text, until)
        if behind and behind[1] in self.stops:
            return behind.end(), behind[1]
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
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
