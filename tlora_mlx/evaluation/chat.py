"""Chat: answers for a judge, in FastChat's MT-Bench format; greedy in every category."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from tlora_mlx.data.formats import framed
from tlora_mlx.evaluation.rows import Row
from tlora_mlx.evaluation.subject import Subject


def read(rows: Sequence[Row], subject: Subject) -> list[dict[str, Any]]:
    """Each row's ``question_id`` and ``turns``.

    A row has MT-Bench's columns ``question_id`` and ``turns`` (what the user says, one text per
    turn); or one question, as ``prompt`` or under another name, and its line number is its id.

    Raises:
        UserError: a row has neither.
    """
    items = []
    for row in rows:
        if "turns" in row.columns:
            turns = row.texts("turns")
            if subject.is_framed:
                turns = [framed(turns[0]), *turns[1:]]
        else:
            turns = [subject.question(row)]
        question_id = row.columns.get("question_id", row.number)
        items.append({"row": row.number, "question_id": question_id, "turns": turns})
    return items


def respond(subject: Subject, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to each item's turns; a later turn sees the answers to the earlier ones."""
    answers: list[list[str]] = [[] for _ in items]
    for turn in range(max(len(item["turns"]) for item in items)):
        asked = [i for i, item in enumerate(items) if turn < len(item["turns"])]
        conversations = []
        for i in asked:
            turns = items[i]["turns"]
            earlier = [text for pair in zip(turns, answers[i], strict=False) for text in pair]
            conversations.append([*earlier, turns[turn]])
        for i, answer in zip(asked, subject.generate(conversations), strict=True):
            answers[i].append(answer)
    return [{"answers": texts} for texts in answers]


def metrics(items: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean length of an answer and the share of empty ones; scoring is up to the judge."""
    texts = [text for output in outputs for text in output["answers"]]
    return {
        "mean_characters": sum(map(len, texts)) / len(texts),
        "empty": sum(not text.strip() for text in texts) / len(texts),
    }


def samples(
    items: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]], model_id: str
) -> list[dict[str, Any]]:
    """FastChat's model answers, one per question: ``fastchat/llm_judge/gen_model_answer.py``."""
    lines = []
    for item, output in zip(items, outputs, strict=True):
        identity = f"{model_id}\n{item['question_id']}\n{output['answers']}"
        lines.append(
            {
                "question_id": item["question_id"],
                "answer_id": hashlib.sha256(identity.encode()).hexdigest()[:22],
                "model_id": model_id,
                "choices": [{"index": 0, "turns": output["answers"]}],
                "tstamp": time.time(),
            }
        )
    return lines
