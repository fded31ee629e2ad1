"""Commonsense and language understanding: which choice does the model find most likely?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tlora_mlx.errors import UserError
from tlora_mlx.evaluation.rows import ANSWERS, Row
from tlora_mlx.evaluation.subject import Subject


def read(rows: Sequence[Row], subject: Subject) -> list[dict[str, Any]]:
    """Each row's ``prompt``, ``choices`` and ``answer``, the index of the right choice.

    A row has ``prompt`` and ``choices`` (what may follow the prompt), and ``answer`` (or
    ``completion``, …): the right choice's text or its index, counted from 0. A format converts raw
    rows to this. If no row has ``choices``, they are the answers that occur in the data.

    Raises:
        UserError: a row does not have these columns.
    """
    rows = [subject.formatted(row) for row in rows]
    shared = None
    if not any("choices" in row.columns for row in rows):
        shared = sorted({_answer(row) for row in rows})
        if len(shared) < 2:
            raise UserError(
                f"{rows[0].where} and all other rows have no 'choices' and only one answer, "
                f"'{shared[0]}'"
            )
    items = []
    for row in rows:
        choices = shared or row.texts("choices")
        items.append(
            {
                "row": row.number,
                "prompt": subject.question(row),
                "choices": choices,
                "answer": _place(row, choices),
            }
        )
    return items


def _answer(row: Row) -> str:
    # Training used the format's completion; the raw answer may be worded differently.
    names = ("completion", *ANSWERS) if "prompt" in row.columns else ANSWERS
    return row.text(*names)


def _place(row: Row, choices: list[str]) -> int:
    place = row.columns.get("answer")
    if isinstance(place, int) and not isinstance(place, bool):
        if not 0 <= place < len(choices):
            raise UserError(
                f"{row.where}: 'answer' {place} is not one of its {len(choices)} choices"
            )
        return place
    answer = _answer(row)
    if answer not in choices:
        raise UserError(f"{row.where}: the answer '{answer}' is not one of its choices {choices}")
    return choices.index(answer)


def respond(subject: Subject, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each choice's log-likelihood, and the likeliest choice, with and without length scaling."""
    pairs = [(item["prompt"], choice) for item in items for choice in item["choices"]]
    likelihoods = iter(subject.log_likelihoods(pairs))
    outputs = []
    for item in items:
        values = [next(likelihoods) for _ in item["choices"]]
        outputs.append(
            {
                "log_likelihoods": values,
                "given": likeliest(values),
                "given_normalized": likeliest(by_length(values, item["choices"])),
            }
        )
    return outputs


def likeliest(values: Sequence[float]) -> int:
    """The index of the largest value; the first one on a tie."""
    return max(range(len(values)), key=values.__getitem__)


def by_length(log_likelihoods: Sequence[float], choices: Sequence[str]) -> list[float]:
    """Log-likelihoods per character (lm-eval's ``acc_norm``, ``lm_eval/api/task.py``)."""
    return [v / max(len(c), 1) for v, c in zip(log_likelihoods, choices, strict=True)]


def metrics(items: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """``accuracy``, and ``accuracy_normalized`` with likelihoods divided by length."""
    return {
        name: sum(o[key] == i["answer"] for i, o in zip(items, outputs, strict=True)) / len(items)
        for name, key in (("accuracy", "given"), ("accuracy_normalized", "given_normalized"))
    }


def labelled_metrics(
    items: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """``metrics``, the F1 score of each label and their mean, ``f1_macro``."""
    right = [item["choices"][item["answer"]] for item in items]
    given = [i["choices"][o["given"]] for i, o in zip(items, outputs, strict=True)]
    scores = f1_scores(right, given)
    return {
        **metrics(items, outputs),
        "f1_macro": sum(scores.values()) / len(scores),
        **{f"f1 of '{label}'": score for label, score in scores.items()},
    }


def f1_scores(right: Sequence[str], given: Sequence[str]) -> dict[str, float]:
    """Per label that occurs: 2 · hits / (right ones + given ones)."""
    scores = {}
    for label in sorted({*right, *given}):
        hits = sum(a == b == label for a, b in zip(right, given, strict=True))
        scores[label] = 2 * hits / (list(right).count(label) + list(given).count(label))
    return scores
