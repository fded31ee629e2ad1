"""What a row has and its chat template does not show, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tlora_mlx.data.conversation import REASONING_FIELDS, Conversation, answer_of, function_of
from tlora_mlx.data.offsets import stand_in


def unseen(
    conversation: Conversation, text: str, render: Callable[[Conversation], str]
) -> Iterator[str]:
    """Sentences that follow the name of the row.

    Args:
        conversation: as given.
        text: all of it, rendered.
        render: what renders a conversation.
    """
    messages = conversation.messages
    for field in _hidden_reasoning(messages, text):
        yield (
            f"the chat template shows nothing of '{field}', so it is not learnt; put what is to be "
            "learnt into the content"
        )
    names = [function_of(tool).get("name") for tool in conversation.tools or ()]
    if names and not any(str(name) in text for name in names):
        yield (
            "the chat template shows nothing of 'tools', so the model does not see them; describe "
            "them in a message"
        )
    for role in dict.fromkeys(_hidden_roles(conversation, text, render)):
        yield (
            f"the chat template does not show all messages of role '{role}', so the model does "
            "not see them; put their text into messages of a role that it shows"
        )


def content_unseen(message: dict[str, Any], turn: str) -> Iterator[str]:
    """A sentence where a message's turn, as rendered, lacks the content beside its calls."""
    if message.get("tool_calls") and _bare(answer_of(message)) not in _bare(turn):
        yield (
            "the chat template does not show the content of a message before its tool_calls, so "
            "the calls alone are learnt"
        )


def _hidden_reasoning(messages: Sequence[dict[str, Any]], text: str) -> list[str]:
    """The fields of the last answer's reasoning of which a rendered conversation shows nothing.

    Only the last answer's: templates may drop the reasoning of earlier ones.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    last = answers[-1] if answers else {}
    given = {field: last.get(field) for field in REASONING_FIELDS}
    return [f for f, t in given.items() if isinstance(t, str) and t.strip() not in text]


def _hidden_roles(
    conversation: Conversation, text: str, render: Callable[[Conversation], str]
) -> Iterator[str]:
    """The roles of the messages, but for the assistant's, without which all is rendered alike."""
    messages = conversation.messages
    for number, message in enumerate(messages):
        if message["role"] == "assistant" or message["content"].strip() in text:
            continue
        changed = {**message, "content": stand_in(message["content"])}
        others = [*messages[:number], changed, *messages[number + 1 :]]
        try:
            other = render(conversation._replace(messages=others))
        except Exception:  # a template that reads the content shows something of it
            continue
        if other == text:
            yield message["role"]


def _bare(text: str) -> str:
    return "".join(text.split())
