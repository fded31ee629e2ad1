"""What is wrong with rows, told together with their lines."""

from __future__ import annotations

from collections.abc import Sequence

from tlora_mlx.errors import UserError

# Faults of a file that are told before it is given up.
MOST_FAULTS = 20


def first_numbers(rows: Sequence[int]) -> str:
    """The numbers of the first ten rows."""
    return ", ".join(map(str, rows[:10])) + (", …" if len(rows) > 10 else "")


class Faults:
    """What is wrong with the rows of a split, collected so that all of it is told at once.

    Args:
        where: what the rows are numbered in, such as "DIR/train.jsonl, line".
    """

    def __init__(self, where: str):
        self._where = where
        self._found: dict[str, list[int]] = {}

    def add(self, number: int, fault: str) -> None:
        """One row's fault: what follows its number, such as " has no 'text'".

        Raises:
            UserError: there are as many as are told.
        """
        self._found.setdefault(fault, []).append(number)
        if sum(map(len, self._found.values())) == MOST_FAULTS:
            self.raise_if_any("; there may be more")

    def raise_if_any(self, more: str = "") -> None:
        """End with one sentence that has all of them, and ``more`` at its end.

        Raises:
            UserError: there is one.
        """
        if self._found:
            unit = self._where.rsplit(" ", 1)[-1]
            told = []
            for fault, (first, *others) in self._found.items():
                also = f" (also {unit} {', '.join(map(str, others))})" if others else ""
                told.append(f"{first}{fault}{also}")
            raise UserError(f"{self._where} {f'; {unit} '.join(told)}{more}")
