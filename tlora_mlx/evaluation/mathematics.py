r"""Mathematics: is the final answer right? For the forms of GSM8K and MATH.

The answer is what follows the last of "#### ", "The answer is" and ``\boxed{…}``. Two answers are
compared by math-verify, the judge of Hugging Face's leaderboards: 0.5, 1/2 and ``\frac12`` are the
same. It can also find final answers, but accepts any last number as one; GSM8K's strict score
requires a mark, so we find the answer ourselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from tlora_mlx.errors import UserError
from tlora_mlx.evaluation.rows import ANSWERS, Row
from tlora_mlx.evaluation.subject import Subject

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?:/\d+)?"


def read(rows: Sequence[Row], subject: Subject) -> list[dict[str, Any]]:
    """Each row's ``prompt`` and right ``answer``.

    A row has ``prompt`` (or ``question``, ``query``, ``problem``, ``instruction``) and ``answer``
    (or ``completion``, ``response``, ``solution``, ``output``): the answer itself or a worked
    solution that ends with it.

    Raises:
        UserError: a row has no question or no answer.
    """
    items = []
    for row in rows:
        solution = row.text(*ANSWERS)
        answer = marked_answer(solution) or solution.strip()
        if not re.search(r"\w", answer):
            raise UserError(f"{row.where} has no final answer")
        items.append({"row": row.number, "prompt": subject.question(row), "answer": answer})
    return items


def respond(subject: Subject, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each response, its final answer, and whether that is right, marked and unmarked."""
    outputs = []
    responses = subject.generate([[item["prompt"]] for item in items])
    for item, response in zip(items, responses, strict=True):
        marked = marked_answer(response)
        given = marked if marked is not None else last_number(response)
        outputs.append(
            {
                "response": response,
                "given": given,
                "exact_match": marked is not None and is_equal(marked, item["answer"]),
                "exact_match_flexible": given is not None and is_equal(given, item["answer"]),
            }
        )
    return outputs


def metrics(items: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The shares of right answers, by lm-eval's strict and flexible filters.

    ``exact_match`` requires a marked answer; ``exact_match_flexible`` also takes the last number.
    """
    names = ("exact_match", "exact_match_flexible")
    return {name: sum(output[name] for output in outputs) / len(outputs) for name in names}


def marked_answer(text: str) -> str | None:
    r"""What follows the last "####" or "The answer is", or is in the last ``\boxed{…}``."""
    found = [
        (match.start(), _sentence(match[1]))
        for match in re.finditer(r"(?i)\banswer is\b:?[ \t]*(\S[^\n]*)", text)
    ]
    found += [(match.start(), match[1]) for match in re.finditer(r"####[ \t]*(\S[^\n]*)", text)]
    found += [(match.start(), _braces(text, match.end() - 1)) for match in _boxes(text)]
    found = [(place, answer) for place, answer in found if answer is not None]
    if not found:
        return None
    _, answer = max(found)
    boxes = list(_boxes(answer))  # "The answer is $\boxed{18}$."
    inside = _braces(answer, boxes[-1].end() - 1) if boxes else None
    return (answer if inside is None else inside).strip()


def _boxes(text: str) -> Any:
    return re.finditer(r"\\f?box(?:ed)?\s*\{", text)


def _sentence(text: str) -> str:
    """The text up to the full stop; a decimal point is not one."""
    return re.split(r"\.(?=\s|$)", text, maxsplit=1)[0]


def _braces(text: str, start: int) -> str | None:
    """What the brace that opens at ``start`` encloses; None if it is never closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 1 : i]
    return None


def last_number(text: str) -> str | None:
    """The last number in the text, as it is written."""
    numbers = [match[0] for match in re.finditer(_NUMBER, text) if match[0]]
    return numbers[-1] if numbers else None


def is_equal(given: str, right: str) -> bool:
    """Whether two final answers are the same according to math-verify."""
    from math_verify import parse, verify

    if not given.strip():
        return False
    gold = parse(f"${right}$")
    if verify(gold, parse(f"${given}$")):
        return True
    has_words = re.search(r"(?<!\\)\b[A-Za-z]{2,}", given)  # "18 dollars", "a total of $18"
    return bool(has_words) and verify(gold, parse(given))


def check_judge() -> None:
    """Check that the package that compares answers is installed, before anything slow starts.

    Raises:
        UserError: it is not.
    """
    if find_spec("math_verify") is None:
        raise UserError("--task math needs the package math-verify: pip install 'tlora-mlx[math]'")
