"""Reading ``metrics.jsonl`` and other JSON lines files in a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tlora_mlx.errors import UserError


def read_lines(path: Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; none if the file does not exist.

    The last line may be incomplete: the run may still be going, or may have crashed.

    Args:
        path: the file.
        skip_damaged: skip every line that is not a JSON object, not just the last.

    Raises:
        UserError: a line other than the last is not a JSON object (the message gives its number).
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines) and not skip_damaged:
            raise UserError(f"{path}, line {number} is damaged: not a JSON object")
    return rows
