"""A row as a conversation: what chat templates take, made of what people's files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tlora_mlx.storage.files import is_unicode

# The fields in which an assistant's reasoning is kept apart from its answer (transformers' chat
# templates, OpenAI's API, DeepSeek's).
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")

# What thinking within the content stands between.
_THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))

# What other data sets and models call the roles that chat templates know.
_ROLES = {"human": "user"}
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bard", "bot", "ai", "model"), "assistant")


class MalformedRowError(ValueError):
    """A row is no conversation; the sentence goes on from the name of the row."""


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
        MalformedRowError: a message is malformed.
    """
    tools = _tools(row.get("tools"))
    if "messages" not in row:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        return Conversation(messages, tools)
    if seen := [name for name in ("image", "images", "videos", "audios") if row.get(name)]:
        raise MalformedRowError(f" has '{seen[0]}'; only text can be trained on")
    messages = row["messages"]
    if not messages or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise MalformedRowError(": 'messages' is not a list of objects with 'role' and 'content'")
    return Conversation([_message(i, m) for i, m in enumerate(messages, 1)], tools)


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """One message, its content a text."""
    where = f", message {number}"
    if not isinstance(message["role"], str):
        raise MalformedRowError(f"{where}: 'role' is not a text but {_shown(message['role'])}")
    made = _without_function_call(message)
    role = made["role"]
    known = _ROLES.get(role.lower(), role.lower())
    if role != known and known in ("user", "assistant", "system", "tool"):
        raise MalformedRowError(
            f"{where} has the role '{role}', which chat templates call '{known}'; rename it"
        )
    if made.get("weight") not in (None, 0, 1):
        raise MalformedRowError(f"{where}: 'weight' is not 0 or 1 but {_shown(made['weight'])}")
    if calls := made.get("tool_calls"):
        made["tool_calls"] = _tool_calls(calls, where)
    content = made.get("content")
    if content is None and not calls:
        if "content" in message:
            raise MalformedRowError(
                f"{where}: 'content' is null; only a message with tool_calls may have none"
            )
        found = ", ".join(repr(str(key)) for key in message)
        raise MalformedRowError(f"{where} has {found}, but no 'content'")
    made["content"] = _text("" if content is None else content, where)
    return made


def _without_function_call(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with OpenAI's former ``function_call`` as the one of its ``tool_calls``."""
    made = dict(message)
    if (function := made.pop("function_call", None)) and not made.get("tool_calls"):
        made["tool_calls"] = [{"type": "function", "function": function}]
    return made | ({"role": "tool"} if made["role"] == "function" else {})


def is_learnt(message: Mapping[str, Any]) -> bool:
    """Whether it is an assistant's; in OpenAI's form, one of weight 0 is context alone."""
    return message["role"] == "assistant" and message.get("weight") != 0


def has_empty_answer(conversation: Conversation) -> bool:
    """Whether a turn that is learnt says nothing and calls nothing."""
    said = ("content", "tool_calls", *REASONING_FIELDS)
    return any(
        is_learnt(message) and not any(_is_filled(message.get(field)) for field in said)
        for message in conversation.messages
    )


def _is_filled(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def _text(content: Any, where: str) -> str:
    """Content as a text; parts of type text are joined without anything between them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise MalformedRowError(f"{where}: 'content' is neither a text nor a list of parts")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"type '{kind}'" if isinstance(kind, str) else _shown(part)
            raise MalformedRowError(f"{where} has a part of {what}; only text can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI's tool calls, with the mapping that templates want as their arguments."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise MalformedRowError(f"{where}: 'tool_calls' is not a list of objects")
    made = []
    for call in calls:
        function = function_of(call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise MalformedRowError(f"{where}: a tool call has no function with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = _parsed(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = ""
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, Mapping):
            raise MalformedRowError(
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


def answer_of(message: Mapping[str, Any]) -> str:
    """A message's content behind its thinking."""
    answer = message["content"]
    for _, end in _THINKING:
        answer = answer.rpartition(end)[2]
    return answer


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
            tools = _parsed(tools or "null")
        except (ValueError, RecursionError):
            raise MalformedRowError(": 'tools' is not valid JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise MalformedRowError(f": 'tools' is not a list but {_shown(tools)}")
    for tool in tools or ():
        if not isinstance(tool, Mapping):
            raise MalformedRowError(f": 'tools' has {_shown(tool)}, which is no object")
    return tools or None


def _parsed(text: str) -> Any:
    """JSON within a row.

    Raises:
        ValueError: it is not valid, or has half of a character, which no tokenizer takes.
    """
    value = json.loads(text)
    if "\\u" in text and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half of a character")
    return value


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:40]
