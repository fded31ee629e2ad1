"""The tasks: how to read, answer and measure rows; each is an object with a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tlora_mlx.config.usage_options import EvaluateCommand
from tlora_mlx.evaluation import chat, choices, code_generation, mathematics, perplexity
from tlora_mlx.evaluation.execution import Limits

Items = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A family of evaluations.

    Attributes:
        read: rows and subject -> items: the questions, and the right answers.
        respond: subject and items -> outputs: the model's answers, and their scores.
        metrics: items and outputs -> figures by name; None for one that is not finite.
        samples: items, outputs and the model's name -> lines for another tool that judges the
            answers; None if there is none.
    """

    read: Callable[..., Items]
    respond: Callable[..., Items]
    metrics: Callable[..., dict[str, float | None]]
    samples: Callable[..., Items] | None = None


def _math(config: EvaluateCommand, stored: Mapping[str, Any]) -> Task:
    mathematics.check_judge()
    return Task(mathematics.read, mathematics.respond, mathematics.metrics)


def _code(config: EvaluateCommand, stored: Mapping[str, Any]) -> Task:
    limits = Limits() if config.execute else None
    respond = partial(code_generation.respond, limits=limits)
    return Task(code_generation.read, respond, code_generation.metrics, code_generation.samples)


def _perplexity(config: EvaluateCommand, stored: Mapping[str, Any]) -> Task:
    read = partial(
        perplexity.read,
        max_seq_length=stored.get("max_seq_length") or 2048,
        mask_prompt=stored.get("mask_prompt"),
    )
    return Task(read, perplexity.respond, perplexity.metrics)


_COMMONSENSE = Task(choices.read, choices.respond, choices.metrics)
_NLU = Task(choices.read, choices.respond, choices.labelled_metrics)
_CHAT = Task(chat.read, chat.respond, chat.metrics, chat.samples)

# By name: a function that makes the task from the command's options and those of the run.
TASKS: dict[str, Callable[[EvaluateCommand, Mapping[str, Any]], Task]] = {
    "math": _math,
    "commonsense": lambda config, stored: _COMMONSENSE,
    "nlu": lambda config, stored: _NLU,
    "code": _code,
    "chat": lambda config, stored: _CHAT,
    "perplexity": _perplexity,
}
