"""PEFT's tables of regular expressions, ``rank_pattern`` and ``alpha_pattern``."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import regex

from tlora_mlx.adapters.adapter import LONGEST_NAME, is_number, is_rank
from tlora_mlx.errors import UserError, first_line

# What the patterns of an adapter may take: seconds of the processor for all matches together, and
# the product of the counted repeats of one.
SECONDS_OF_MATCHING = 10.0
MOST_REPEATS = 10_000


class Patterns:
    """A table of regular expressions, each with the value for the modules that it matches.

    A pattern matches a module's whole name, or its end after a dot; the first match wins. Patterns
    are those of Python's ``re``, matched by the package ``regex``, which can give up.

    Source: huggingface/peft, ``utils/other.py::get_pattern_key``.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], key: str, is_right: Callable[[Any], bool]
    ):
        table = config.get(key) or {}
        if not isinstance(table, dict) or not all(map(is_right, table.values())):
            raise UserError(
                f"the PEFT adapter {path} has a '{key}' that is not a table of numbers above 0"
            )
        self._path, self._key, self._left = path, key, SECONDS_OF_MATCHING
        self._values = []
        for pattern, value in table.items():
            try:
                self._values.append((_compiled(rf"(.*\.)?({pattern})$"), value))
            except (ValueError, re.error, regex.error, RecursionError, OverflowError) as error:
                raise UserError(
                    f"the PEFT adapter {path} has '{_cut(pattern)}' in its '{key}', which is not a "
                    f"regular expression: {first_line(error)}"
                ) from None

    def of(self, module: str, default: Any) -> Any:
        """The value for a module, or the default if no pattern matches its name.

        Raises:
            UserError: matching takes too long.
        """
        for pattern, value in self._values:
            start = time.thread_time()
            try:
                found = pattern.match(module, timeout=self._left)
            except TimeoutError:
                raise UserError(
                    f"the PEFT adapter {self._path} has '{_cut(pattern.pattern)}' in its "
                    f"'{self._key}', and matching it takes too long"
                ) from None
            self._left = max(0.01, self._left - (time.thread_time() - start))
            if found:
                return value
        return default


def _compiled(pattern: str) -> regex.Pattern[str]:
    """A pattern of ``re``, compiled for matching with a time limit.

    Raises:
        ValueError: it is long or repeats much, so that compiling could take all memory.
    """
    re.compile(pattern)
    counts = (int(n) for n in re.findall(r"[{,](\d{1,9})(?=[,}])", pattern))
    if len(pattern) > LONGEST_NAME or math.prod(max(n, 1) for n in counts) > MOST_REPEATS:
        raise ValueError("it is too long, or repeats too often")
    return regex.compile(pattern)


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]} …"


def patterns_of(path: Path, config: Mapping[str, Any]) -> tuple[Patterns, Patterns]:
    """The ranks and the alphas of the modules that differ from the configuration's defaults."""
    ranks = Patterns(path, config, "rank_pattern", is_rank)
    return ranks, Patterns(path, config, "alpha_pattern", is_number)
