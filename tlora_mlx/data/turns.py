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
from itertools import pairwise
from typing import Any

from tlora_mlx.data.chat_template import Renderer, Tokenized
from tlora_mlx.data.conversation import (
    Conversation,
    function_of,
    is_learnt,
    thoughts_of,
    with_function,
)
from tlora_mlx.data.marked_turns import by_marks
from tlora_mlx.data.offsets import (
    NotLocatedError,
    differing,
    encode_with_offsets,
    inside,
    places_of,
    stand_in,
)
from tlora_mlx.data.unseen import content_unseen, unseen

# A thinking block without thoughts, or what is left of one that the generation prompt opened.
_OPEN, _CLOSE = r"(?:<think>|<thinking>|\[THINK\])", r"(?:</think>|</thinking>|\[/THINK\])"
_EMPTY_THINKING = re.compile(rf"(\s*{_OPEN}?\s*{_CLOSE})\s*")
# What generation prompts end in that finished turns may lack: such a block, open or empty, or an
# empty channel (Gemma 4).
_PROMPT_ENDS = re.compile(rf"(?:{_OPEN}\s*{_CLOSE}?|<\|channel>\w*\s*<channel\|>)\s*$")


class ChatTemplate(Renderer):
    """A tokenizer's chat template, as something that finds the assistant's turns."""

    def tokenize(self, conversation: Conversation) -> Tokenized:
        """Token ids, and which of them count.

        Raises:
            NotLocatedError: it is not certain where a turn is.
            Exception: whatever the template raises.
        """
        messages = conversation.messages
        text = self.render(conversation)
        hidden = [*unseen(conversation, text, self.render)]
        if self.marks_turns and not any(message.get("weight") == 0 for message in messages):
            for number, message in enumerate(messages):
                if message.get("tool_calls"):
                    self._content(conversation, text, number)  # refuses calls that are not shown
                    hidden += content_unseen(message, text)
            return Tokenized(*by_marks(self, conversation), tuple(hidden))
        contents = self._plain_contents(conversation, text)
        places = {
            number: self._locate(conversation, text, number, contents.get(number))
            for number, message in enumerate(messages)
            if is_learnt(message)
        }
        for (_, before, _), (after, _, _) in pairwise(places.values()):
            if after < before:
                raise NotLocatedError("two assistant turns overlap in the rendered conversation")
        tokens, offsets = encode_with_offsets(self.tokenizer, text)
        counts = inside(offsets, [(start, stop) for start, stop, _ in places.values()])
        for number, (start, stop, _) in places.items():
            hidden += content_unseen(messages[number], text[start:stop])
        return Tokenized(tokens, counts, [end for _, _, end in places.values()], tuple(hidden))

    def _plain_contents(self, conversation: Conversation, text: str) -> dict[int, tuple[int, int]]:
        """Where the contents of the turns without thoughts and calls are, by a single rendering.

        Empty where that does not show it; then ``_content`` finds each one by itself.
        """
        messages = list(conversation.messages)
        names = {
            number: f"Q{number}tlora"
            for number, message in enumerate(messages)
            if is_learnt(message) and not message.get("tool_calls") and not thoughts_of(message)
        }
        texts = [messages[number]["content"] for number in names]
        for number, name in names.items():
            messages[number] = {**messages[number], "content": name}
        other = self.render(conversation._replace(messages=messages)) if names else ""
        places = places_of(texts, text, [*names.values()], other)
        return dict(zip(names, places, strict=False))

    def _locate(
        self, conversation: Conversation, text: str, number: int, place: tuple[int, int] | None
    ) -> tuple[int, int, str]:
        """Where a turn's content begins, where its end token ends, and that token's text."""
        message = conversation.messages[number]
        first, last = place or self._content(conversation, text, number)
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
            plain = {"role": "assistant", "content": stand_in("")}
            others = [*messages[:number], plain, *messages[rest:]]
            other = self.render(conversation._replace(messages=others))
            first, _ = differing(text, other)
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
        """What differs in the rendered text when the turn's content and calls are others."""
        message = conversation.messages[number]
        calls = message.get("tool_calls")
        first = last = len(text)
        try:
            first, last = differing(text, self._with(conversation, number, message["content"]))
        except Exception:  # a template may refuse content beside calls (GPT-OSS)
            if message["content"] or not calls:
                raise
        if calls:  # the last call ends the turn
            other = self._with_call(conversation, number, len(calls) - 1)
            if other == text:
                all_of = "" if len(calls) == 1 else "all "
                raise NotLocatedError(f"the template does not show {all_of}tool_calls")
            _, last = differing(text, other)
            if first >= last:  # there is no content, or the template puts it behind the calls
                first, _ = differing(text, self._with_call(conversation, number, 0))
            return first, last
        found, meant = ("".join(t.split()) for t in (text[first:last], message["content"]))
        if found not in meant or (meant and not found):
            raise NotLocatedError("the template rewrites what the assistant says")
        return first, last

    def _with(self, conversation: Conversation, number: int, content: str) -> str:
        other = {**conversation.messages[number], "content": stand_in(content)}
        return self._replaced(conversation, number, other)

    def _with_call(self, conversation: Conversation, number: int, call: int) -> str:
        """With other arguments in a call; its name may stand in the result's header, too."""
        message = conversation.messages[number]
        calls = list(message["tool_calls"])
        function = function_of(calls[call])
        changed = stand_in("".join(function["arguments"]))
        calls[call] = with_function(calls[call], {**function, "arguments": {changed: changed}})
        return self._replaced(conversation, number, {**message, "tool_calls": calls})

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
        directly = self.special.match(text, last)
        if directly and directly[1] in self.stops:
            return directly.end(), directly[1]
        until = self._rendered_length(conversation, text, number)
        bound = self._next_content(conversation, text, number) if until is None else until
        found = list(self.special.finditer(text, last, bound))
        # Tokens in a row (Command R7B's <|END_RESPONSE|><|END_OF_TURN_TOKEN|>) end it together.
        for token in found:
            if token[1] in self.stops:
                return token.end(), token[1]
        # Calls may have tokens within (Kimi K3's <|close|>); the last one ends them.
        if found and until is not None and conversation.messages[number].get("tool_calls"):
            return found[-1].end(), found[-1][1]
        # If the end of the turn is not known, a single token may belong to the next message.
        if directly and directly.end() <= bound and (until is not None or len(found) > 1):
            return directly.end(), directly[1]
        if until is None:
            raise NotLocatedError("the template rewrites the turn, and no end token follows it")
        behind = self.special.match(text, until)
        if behind and behind[1] in self.stops:
            return behind.end(), behind[1]
        return until, ""

    def _next_content(self, conversation: Conversation, text: str, number: int) -> int:
        """Where the next message's content begins."""
        content = conversation.messages[number + 1]["content"]
        return differing(text, self._with(conversation, number + 1, content))[0]

    def _rendered_length(self, conversation: Conversation, text: str, number: int) -> int | None:
        """Where the conversation stands after the turn; None where the template rewrites it."""
        if number == len(conversation.messages) - 1:
            return len(text)
        until = self.render(conversation._replace(messages=conversation.messages[: number + 1]))
        return len(until) if text.startswith(until) else None
