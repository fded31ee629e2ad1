"""A row as a conversation: what chat templates take, made of what people's files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# The fields in which an assistant's reasoning is kept apart from its answer (transformers' chat
# templates, OpenAI's API, DeepSeek's).
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")

# What thinking within the content stands between.
_THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))


class Conversation(NamedTuple):
    """Messages as a chat template takes them.

    Attributes:
        messages: each with ``role`` and ``content``, a text; an assistant's with ``tool_calls``,
            whose arguments are mappings.
        tools: descriptions of functions, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def conversation_of(row: Mapping[str, Any]) -> Conversation:
    """A row with ``messages``, or with ``prompt`` and ``completion``, as a conversation.

    Content given as parts is joined, arguments of tool calls given as JSON are parsed.

    Raises:
        ValueError: a message is malformed; the sentence goes on from the name of the row.
    """
    tools = _tools(row.get("tools"))
    if "messages" not in row:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        return Conversation(messages, tools)
    messages = row["messages"]
    if not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise ValueError(": 'messages' is not a list of objects with 'role' and 'content'")
    return Conversation([_message(i, m) for i, m in enumerate(messages, 1)], tools)


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """One message, its content a text."""
    where = f", message {number}"
    if not isinstance(message["role"], str):
        raise ValueError(f"{where}: 'role' is not a text but {_shown(message['role'])}")
    made = dict(message)
    if calls := message.get("tool_calls"):
        made["tool_calls"] = _tool_calls(calls, where)
    content = message.get("content")
    if content is None and not calls:
        if "content" in message:
            raise ValueError(
                f"{where}: 'content' is null; only a message with tool_calls may have none"
            )
        found = ", ".join(repr(str(key)) for key in message)
        raise ValueError(f"{where} has {found}, but no 'content'")
    made["content"] = _text("" if content is None else content, where)
    return made


def _text(content: Any, where: str) -> str:
    """Content as a text; parts of type text are joined without anything between them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}: 'content' is neither a text nor a list of parts")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"type '{kind}'" if isinstance(kind, str) else _shown(part)
            raise ValueError(f"{where} has a part of {what}; only text can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI's tool calls, with the mapping that templates want as their arguments."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"{where}: 'tool_calls' is not a list of objects")
    made = []
    for call in calls:
        function = function_of(call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: a tool call has no function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, Mapping):
            raise ValueError(
                f"{where}: the arguments of tool call '{function['name']}' are no JSON object"
            )
        made.append(with_function(call, {**function, "arguments": arguments}))
    return made


def function_of(call: Mapping[str, Any]) -> Any:
    """What a tool call calls: under ``function``, as in OpenAI's API, or the call itself."""
    return call.get("function", call)


def with_function(call: Mapping[str, Any], function: dict[str, Any]) -> dict[str, Any]:
    """The tool call with another function, in the same form."""
    return {**call, "function": function} if "function" in call else function


def thoughts_of(message: Mapping[str, Any]) -> list[str]:
    """A message's reasoning, in fields of its own and before the content's end of thinking."""
    thoughts = [message[field] for field in REASONING_FIELDS if isinstance(message.get(field), str)]
    thoughts = [thought.strip() for thought in thoughts if thought]
    for begin, end in _THINKING:
        before, found, _ = message["content"].partition(end)
        if found:
            thoughts.append(before.strip().removeprefix(begin).strip())
    return thoughts


def hidden_reasoning(messages: Sequence[Mapping[str, Any]], text: str) -> tuple[str, ...]:
    """The fields of the last answer's reasoning of which a rendered conversation shows nothing.

    Only the last answer's: templates may drop the reasoning of earlier ones.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    last = answers[-1] if answers else {}
    given = {field: last.get(field) for field in REASONING_FIELDS}
    return tuple(f for f, t in given.items() if isinstance(t, str) and t.strip() not in text)


def with_arguments_as_text(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose tool calls have their arguments as JSON, as OpenAI's API gives them."""
    made = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            text = json.dumps(function_of(call)["arguments"], ensure_ascii=False)
            calls.append(with_function(call, {**function_of(call), "arguments": text}))
        made.append({**message, "tool_calls": calls} if calls else message)
    return made


def _tools(tools: Any) -> list[Any] | None:
    """A row's descriptions of functions, which some data sets keep as JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except (ValueError, RecursionError):
            raise ValueError(": 'tools' is not valid JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f": 'tools' is not a list but {_shown(tools)}")
    return tools or None


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:40]
