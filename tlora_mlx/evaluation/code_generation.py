"""Code: solutions in EvalPlus's format and, only on request, whether they pass their tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from tlora_mlx.data.formats import framed
from tlora_mlx.errors import UserError
from tlora_mlx.evaluation.execution import Limits, best_sandbox, run_program
from tlora_mlx.evaluation.rows import Row
from tlora_mlx.evaluation.subject import Subject

# Where a base model's continuation leaves the function (the Codex paper's stop sequences).
STOPS = ("\ndef ", "\nclass ", "\nif ", "\nprint(", "\nassert ", "\n#", "\n```", "\nimport ")
STOPS += ("\nfrom ", "\n@")


def read(rows: Sequence[Row], subject: Subject) -> list[dict[str, Any]]:
    """Each row's ``task_id``, ``prompt``, the ``header`` to continue, and its ``test``, if any.

    A row has HumanEval's columns: ``task_id``, ``prompt`` (code to continue), ``entry_point`` and
    optionally ``test``, which defines ``check``; or MBPP's: ``task_id``, ``text`` (or ``prompt``,
    in words) and ``test_list`` (lines of Python), optionally after ``test_setup_code`` or
    ``test_imports``.

    Raises:
        UserError: a row is neither.
    """
    items = []
    for row in rows:
        task_id = row.text("task_id")
        if "entry_point" in row.columns:
            header, name = row.text("prompt"), row.text("entry_point")
            test = f"{row.text('test')}\n\ncheck({name})\n" if row.columns.get("test") else None
            if subject.is_framed or subject.base.tokenizer.has_chat_template:
                asked = f"Complete this Python function:\n```python\n{header.strip()}\n```"
            else:
                asked = header
        else:
            if "test_list" not in row.columns:
                raise UserError(f"{row.where} has neither 'entry_point' nor 'test_list'")
            lines = row.texts("test_list")
            task_id = f"Mbpp/{task_id}" if task_id.isdigit() else task_id  # as in EvalPlus
            setup = row.columns.get("test_setup_code") or ""
            setup += "\n".join(row.columns.get("test_imports") or [])
            header, test = "", "\n".join([setup, *lines]) + "\n"
            asked = "\n".join(
                [row.text("text", "prompt"), "Write Python code that passes these tests:", *lines]
            )
        if subject.is_framed:
            asked = framed(asked)
        items.append(
            {
                "row": row.number,
                "task_id": task_id,
                "prompt": asked,
                "header": header,
                "test": test,
            }
        )
    return items


def respond(
    subject: Subject, items: Sequence[dict[str, Any]], limits: Limits | None = None
) -> list[dict[str, Any]]:
    """Each response, the ``solution`` in it, whether that is Python, and the test's outcome.

    Only if limits are given is the solution run.

    Raises:
        UserError: limits are given, but a row has no test.
    """
    untested = [item["row"] for item in items if item["test"] is None]
    if limits and untested:
        raise UserError(f"--execute needs rows with a test; row {untested[0]} has none")
    outputs = []
    responses = subject.generate([[item["prompt"]] for item in items])
    for item, response in zip(items, responses, strict=True):
        code = solution(item["header"], response)
        outputs.append({"response": response, "solution": code, "is_python": is_python(code)})
    if limits:
        sandbox = best_sandbox()
        where = f"in {sandbox.name}" if sandbox.name else "without a sandbox"
        subject.observer.note(f"the programs run {where}: {sandbox.covers}")
        with subject.observer.stage(f"{subject.title} runs", len(items)) as advance:
            for item, output in zip(items, outputs, strict=True):
                output["outcome"] = run_program(f"{output['solution']}\n\n{item['test']}", limits)
                advance()
    return outputs


def solution(header: str, response: str) -> str:
    """The whole program, made from the header and the response.

    If the response has fenced code, that is its first block, preceded by the header unless the
    block defines the header's function itself. Otherwise it is the header, continued by the
    response up to where that leaves the function.
    """
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", response, re.DOTALL)
    if not header:
        return (block[1] if block else response).strip() + "\n"
    if block is None:
        body = response
        ends = [place for stop in STOPS if (place := body.find(stop)) >= 0]
        return header + body[: min(ends, default=len(body))].rstrip() + "\n"
    names = re.findall(r"^def (\w+)", header, re.MULTILINE)
    if names and re.search(rf"^def {names[-1]}\b", block[1], re.MULTILINE):
        # The imports and helpers in the header.
        before = header[: header.rindex(f"def {names[-1]}")]
        return before + block[1].strip("\n") + "\n"
    return header + block[1].rstrip() + "\n"


def is_python(code: str) -> bool:
    """Whether it can be parsed; it is not run."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def metrics(items: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The share that is Python and, if they were run, ``pass@1`` of the one greedy sample."""
    shares = {"is_python": sum(output["is_python"] for output in outputs) / len(outputs)}
    if "outcome" in outputs[0]:
        passed = sum(output["outcome"] == "passed" for output in outputs)
        shares["pass@1"] = passed / len(outputs)
    return shares


def samples(
    items: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]], model_id: str
) -> list[dict[str, Any]]:
    """EvalPlus's lines (``evalplus.evaluate --samples``): ``task_id`` and ``solution``."""
    return [
        {"task_id": item["task_id"], "solution": output["solution"]}
        for item, output in zip(items, outputs, strict=True)
    ]
