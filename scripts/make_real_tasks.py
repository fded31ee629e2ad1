"""Make the real tasks of ``compare_methods.py`` from published data sets, short enough for a CPU.

    python scripts/make_real_tasks.py --source DIR --model MODEL --output tasks

``--source`` has a folder per data set, each with ``train.jsonl`` and ``test.jsonl`` (validation
rows are taken from the training rows): ``gsm8k`` with the columns of openai/gsm8k on the Hub
(``question``, ``answer``); ``arc_easy`` and ``openbookqa`` as AGI-Edgerunners/LLM-Adapters
publishes them (``instruction`` with the choices in it, ``answer`` with the right one's number).

Of GSM8K a row is the question and the worked answer; of the others, the question alone and the text
of the right choice, and all choices in ``choices.jsonl``, for the accuracy of the likeliest (a
small model does not learn to name a choice by its number). Rows that the model's template makes
longer than ``--max-tokens`` are left out; of the others, the first are taken, as many as ``ROWS``
says.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

ROWS = {"train": 400, "valid": 48, "test": 96}
SPLIT_AT = re.compile(r"\s*Answer\d+:\s*")


def worked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of GSM8K."""
    return {"prompt": row["question"], "completion": row["answer"]}


def cloze(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of LLM-Adapters: the question, its right choice's text, and all choices."""
    asked, choices, _ = row["instruction"].split("\n\n")
    question = asked.removeprefix("Please choose the correct answer to the question: ")
    texts = SPLIT_AT.split(choices)[1:]
    place = int(row["answer"].removeprefix("answer")) - 1
    return {"prompt": question, "completion": texts[place], "choices": texts, "answer": place}


TASKS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gsm8k": worked,
    "arc_easy": cloze,
    "openbookqa": cloze,
}


def short_rows(
    path: Path, task: str, tokenizer: Any, max_tokens: int, number: int
) -> list[dict[str, Any]]:
    """The first rows of a file, as the task has them, that are short enough."""
    found: list[dict[str, Any]] = []
    with path.open() as lines:
        for line in lines:
            row = TASKS[task](json.loads(line))
            roles = {"user": row["prompt"], "assistant": row["completion"]}
            turns = [{"role": role, "content": text} for role, text in roles.items()]
            if len(tokenizer.apply_chat_template(turns)["input_ids"]) <= max_tokens:
                found.append(row)
            if len(found) == number:
                break
    return found


def write_rows(path: Path, rows: list[dict[str, Any]], *columns: str) -> None:
    """These columns as JSON lines."""
    lines = (json.dumps({name: row[name] for name in columns}) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=140)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for task in TASKS:
        directory = args.output / task
        directory.mkdir(parents=True, exist_ok=True)

        def rows_of(file: str, number: int, task: str = task) -> list[dict[str, Any]]:
            path = args.source / task / file
            return short_rows(path, task, tokenizer, args.max_tokens, number)

        train = rows_of("train.jsonl", ROWS["train"] + ROWS["valid"])
        splits = {"train": train[: ROWS["train"]], "valid": train[ROWS["train"] :]}
        splits["test"] = rows_of("test.jsonl", ROWS["test"])
        for split, rows in splits.items():
            write_rows(directory / f"{split}.jsonl", rows, "prompt", "completion")
        if "choices" in splits["test"][0]:
            path = directory / "choices.jsonl"
            write_rows(path, splits["test"], "prompt", "choices", "answer")


if __name__ == "__main__":
    main()
