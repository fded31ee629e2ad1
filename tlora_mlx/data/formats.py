"""Named formatters: rows of well-known data sets as they come, to prompt and completion.

A format maps a raw row to an instruction and its response. Where the model has a chat template, the
instruction is the user's message; elsewhere it is put into Alpaca's frame, as the authors do
(Rambo-Yi/TLora e3463ae, ``math_train.py``; their ``commonsense_train.py`` has the same words with
stray indentation, which is left out here).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

FRAME = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
FRAME_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
# What a base model goes on with when it does not know where to end.
FRAME_STOPS = ("### Instruction:", "### Input:", "### Response:", "Below is an instruction")

# The columns that are trained on: a prompt and its completion, messages, or a text.
TRAINED_ON = ("prompt", "completion", "messages", "text")

Row = Mapping[str, Any]


def _text(row: Row, *names: str) -> str:
    """The first column of these names that the row has, as a text."""
    for name in names:
        if name in row:
            if not isinstance(row[name], str):
                raise ValueError(f"'{name}' is not a text but {str(row[name])[:40]}")
            return row[name]
    found = ", ".join(repr(str(key)) for key in row) or "nothing"
    raise ValueError(f"it has {found}, but no {' or '.join(map(repr, names))}")


def _metamath(row: Row) -> dict[str, Any]:
    """meta-math/MetaMathQA: ``query``, ``response``; the test sets' columns too."""
    return {
        "instruction": _text(row, "query", "question", "problem", "instruction"),
        "response": _text(row, "response", "solution", "output", "answer"),
    }


def _codefeedback(row: Row) -> dict[str, Any]:
    """m-a-p/CodeFeedback-Filtered-Instruction: ``query``, ``answer``."""
    return {"instruction": _text(row, "query"), "response": _text(row, "answer")}


def _wizardlm(row: Row) -> dict[str, Any]:
    """WizardLM's evolved instructions, both shapes.

    WizardLMTeam/WizardLM_evol_instruct_V2_196k has ``conversations`` of a human and gpt, of which
    the first exchange is taken; WizardLM_evol_instruct_70k has ``instruction`` and ``output``.
    """
    if "conversations" not in row:
        return {"instruction": _text(row, "instruction"), "response": _text(row, "output")}
    turns = row["conversations"]
    if not (isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns)):
        raise ValueError("'conversations' is not a list of objects with 'from' and 'value'")
    if [turn.get("from") for turn in turns[:2]] != ["human", "gpt"]:
        raise ValueError("'conversations' does not begin with a turn of 'human' and one of 'gpt'")
    return {"instruction": _text(turns[0], "value"), "response": _text(turns[1], "value")}


def _commonsense(row: Row) -> dict[str, Any]:
    """commonsense_170k and the test sets of AGI-Edgerunners/LLM-Adapters.

    ``instruction`` (which ends with "Answer format: a/b/c"), ``input``, ``output`` ("the correct
    answer is b"). The choices are that sentence with each word of the answer format.
    """
    made = {"instruction": _text(row, "instruction"), "response": _text(row, "output").strip()}
    if row.get("input"):
        made["input"] = _text(row, "input")
    if answers := re.search(r"Answer format:\s*(\S+/\S+)\s*$", made["instruction"]):
        made["choices"] = [f"the correct answer is {word}" for word in answers[1].split("/")]
    return made


# A GLUE-like row's texts, by the names that GLUE and its copies give them; the order matters, since
# "sentence" is in several.
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)


def _glue(row: Row) -> dict[str, Any]:
    """A text or a pair, and ``label_text`` or ``label``: nyu-mll/glue, SetFit's copies."""
    names = next((names for names in _PAIRS if all(name in row for name in names)), None)
    if names is None:
        raise ValueError(
            f"it has {', '.join(repr(str(key)) for key in row) or 'nothing'}, but no "
            f"{', no '.join(' and '.join(map(repr, names)) for names in _PAIRS)}"
        )
    label = row.get("label_text", row.get("label"))
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise ValueError("it has neither 'label' nor 'label_text' with a name or a number")
    lines = [f"{name}: {_text(row, name)}" for name in names]
    return {"instruction": "\n".join([*lines, "label:"]), "response": str(label)}


def _alpaca(row: Row) -> dict[str, Any]:
    """tatsu-lab/alpaca and its many copies: ``instruction``, maybe ``input``, ``output``.

    With LLaMA-Factory's ``system`` or ``history`` (pairs of earlier questions and answers) it is a
    conversation.
    """
    made = {"instruction": _text(row, "instruction"), "response": _text(row, "output")}
    if row.get("input"):
        made["input"] = _text(row, "input")
    earlier = row.get("history") or []
    if not (isinstance(earlier, list) and all(map(_is_pair, earlier))):
        raise ValueError("'history' is not a list of pairs of texts")
    messages = _system(row) + [
        {"role": role, "content": text}
        for pair in earlier
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    if not messages:
        return made
    last = {"role": "user", "content": _joined(made["instruction"], made.get("input"))}
    return {"messages": [*messages, last, {"role": "assistant", "content": made["response"]}]}


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(t, str) for t in value)


def _system(row: Row) -> list[dict[str, Any]]:
    """The system message that a row has in a column of its own."""
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []


def _joined(instruction: str, extra: str | None) -> str:
    return "\n\n".join(filter(None, (instruction, extra)))


# ShareGPT's names of who speaks, as chat templates call them.
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant"}
_SPEAKERS |= {role: role for role in ("system", "user", "assistant", "tool")}
# With tools, LLaMA-Factory's: a call as JSON, and what it returned.
_SPEAKERS |= {"function_call": "assistant", "observation": "tool"}


def _sharegpt(row: Row) -> dict[str, Any]:
    """``conversations`` of turns with ``from`` and ``value``; maybe ``system`` and ``tools``."""
    if "conversations" not in row:
        _text(row, "conversations")
    turns = row["conversations"]
    if not (isinstance(turns, list) and turns and all(isinstance(t, Mapping) for t in turns)):
        raise ValueError("'conversations' is not a list of objects with 'from' and 'value'")
    messages = _system(row)
    for number, turn in enumerate(turns, 1):
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise ValueError(f"turn {number} is from {speaker!r}, not {', '.join(_SPEAKERS)}")
        message = {"role": _SPEAKERS[speaker]}
        if speaker == "function_call":
            message["tool_calls"] = _calls(number, _text(turn, "value", "content"))
        elif turn.get("tool_calls") and "value" not in turn:
            message |= {key: turn[key] for key in ("content", "tool_calls") if key in turn}
        else:
            message["content"] = _text(turn, "value", "content")
        messages.append(message | {key: turn[key] for key in ("weight",) if key in turn})
    return {"messages": messages} | ({"tools": row["tools"]} if row.get("tools") else {})


def _calls(number: int, text: str) -> list[Any]:
    """The calls of a turn that has them as JSON: an object with ``name``, or a list of them."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"turn {number} is a function_call, but no JSON") from None
    return calls if isinstance(calls, list) else [calls]


FORMATS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "metamath": _metamath,
    "codefeedback": _codefeedback,
    "wizardlm": _wizardlm,
    "commonsense": _commonsense,
    "glue": _glue,
}


def framed(instruction: str, input: str | None = None) -> str:
    """The prompt of an instruction for a model without chat template."""
    if input:
        return FRAME_WITH_INPUT.format(instruction=instruction, input=input)
    return FRAME.format(instruction=instruction)


def to_prompt(name: str, row: Any, chat: bool) -> dict[str, Any]:
    """A raw row as ``prompt``, ``completion`` and, where the format has them, ``choices``; or as
    ``messages``, where the format has several turns.

    Args:
        name: of the format.
        row: as the data set has it; one with a prompt and a completion is left as it is.
        chat: whether the model has a chat template, which is frame enough.

    Raises:
        ValueError: a column is missing or not of its kind.
    """
    if not isinstance(row, Mapping):
        raise ValueError("it is not a JSON object")
    if "prompt" in row and "completion" in row:
        return dict(row)
    made = FORMATS[name](row)
    if "messages" in made:
        return made
    instruction, extra = made.pop("instruction"), made.pop("input", None)
    prompt = _joined(instruction, extra) if chat else framed(instruction, extra)
    return {"prompt": prompt, "completion": made.pop("response"), **made}


def recognised_format(row: Any) -> str | None:
    """The format of a row that has none of mlx-lm's keys, where its own keys leave no doubt."""
    if not isinstance(row, Mapping) or "messages" in row or {"prompt", "completion"} <= row.keys():
        return None
    if {"instruction", "output"} <= row.keys():  # Alpaca itself has a "text" of both, too
        return "alpaca"
    return "sharegpt" if "conversations" in row and "text" not in row else None


def renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """A row with its columns under the names that are trained on.

    Args:
        row: as the data set has it.
        columns: of ``TRAINED_ON``, by the name of the row's column; the others do not count then.

    Raises:
        ValueError: it has no such column; the sentence goes on from the name of the row.
    """
    if not columns or not isinstance(row, Mapping):
        return row
    if missing := [name for name in columns if name not in row]:
        found = ", ".join(repr(str(key)) for key in row) or "nothing"
        raise ValueError(f" has {found}, but no {' and no '.join(map(repr, missing))}")
    others = {key: row[key] for key in row if key not in TRAINED_ON}
    return others | {wanted: row[name] for name, wanted in columns.items()}
