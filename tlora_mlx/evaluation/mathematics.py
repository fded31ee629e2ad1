r"""Mathematics: is the final answer the right one? GSM8K's and MATH's forms.

The answer is what follows the last of "#### ", "The answer is" and ``\boxed{…}``. Two answers are
equal when their normal forms are, or when both are the same rational number: 0.5, 1/2 and
``\frac12``. The normal form follows hendrycks/math (``modeling/math_equivalence.py``): units,
spaces, dollar and per cent signs, ``\left`` and the like do not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
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
        if not normal_form(answer):
            raise UserError(f"{row.where} has no final answer")
        items.append({"row": row.number, "prompt": subject.question(row), "answer": answer})
    return items


def respond(subject: Subject, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each response, the final answer in it, and whether it is right, with and without a mark."""
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
    """Shares that are right: ``exact_match`` asks for a marked answer, ``exact_match_flexible``
    takes the last number where none is (lm-eval's strict and flexible filters).
    """
    names = ("exact_match", "exact_match_flexible")
    return {name: sum(output[name] for output in outputs) / len(outputs) for name in names}


def marked_answer(text: str) -> str | None:
    r"""What follows the last "####", "The answer is" or is in the last ``\boxed{…}``."""
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
    """Up to the full stop; one inside of a number is none."""
    return re.split(r"\.(?=\s|$)", text, maxsplit=1)[0]


def _braces(text: str, start: int) -> str | None:
    """What the brace that opens at ``start`` encloses; None where it does not close."""
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
    """Whether two final answers are the same."""
    a, b = normal_form(given), normal_form(right)
    if a == b:
        return bool(a)
    wanted = rational(b)
    if wanted is None:
        return False
    value = rational(a)
    if value is None:  # "18 dollars", "a total of $18"
        pattern = rf"(?:[A-Za-z\s:]*\s)?[$€£]?\s?({_NUMBER})\s*%?(?:\s+[A-Za-z\s]*)?"
        match = re.fullmatch(pattern, given.strip().rstrip("."))
        value = rational(normal_form(match[1])) if match and match[1] else None
    return value == wanted


def normal_form(answer: str) -> str:
    """The answer without what makes no difference."""
    s = answer.strip().rstrip(".").replace("\n", "")
    for old in (r"\!", r"\,", r"\;", r"\:", r"\ ", r"\left", r"\right", r"\$", "$", r"\%", "%"):
        s = s.replace(old, " " if old == r"\ " else "")
    s = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°", "", s)
    s = re.sub(r"\\[dtc]frac", r"\\frac", s).replace("\\\\", "\\")
    # A unit: a text after a number, or one that begins with a space (hendrycks/math).
    s = re.sub(r"(?<=\S)\\(?:text|mbox|mathrm)\{\s[^{}]*\}.*$", "", s)
    s = re.sub(r"(?<=\d)\s*\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?$", "", s)
    s = re.sub(r"\\(?:text|textbf|mbox|mathrm|mathbf)\{([^{}]*)\}", r"\1", s)
    s = re.sub(r"\s", "", s)
    if re.fullmatch(r"-?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?", s):
        s = re.sub(r"[,{}]", "", s)
    left, equals, right = s.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        s = right
    s = re.sub(r"(?<!\d)\.(?=\d)", "0.", s)
    s = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", s)
    s = re.sub(r"\\frac(\w)", r"\\frac{\1}", s)
    s = re.sub(r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}", s)
    return re.sub(r"^(-?\w+)/(\w+)$", r"\\frac{\1}{\2}", s).rstrip(".")


def rational(form: str) -> Fraction | None:
    r"""The value of a normal form that is a whole number, a decimal or a ``\frac`` of two."""
    if re.fullmatch(r"[-+]?\d+(?:\.\d+)?", form):
        return Fraction(form)
    match = re.fullmatch(r"([-+]?)\\frac\{(-?\d+)\}\{(-?\d+)\}", form)
    if not match or int(match[3]) == 0:
        return None
    value = Fraction(int(match[2]), int(match[3]))
    return -value if match[1] == "-" else value
