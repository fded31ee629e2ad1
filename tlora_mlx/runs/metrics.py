"""Reading ``metrics.jsonl``, and other files of JSON lines that a run directory holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tlora_mlx.errors import UserError


def read_lines(path: Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no such file.

    The last line may be half-written: the run may be going on, or may have crashed.

    Args:
        path: the file.
        skip_damaged: pass over any line that is no JSON object, not the last one alone.

    Raises:
        UserError: another line is no JSON object; it is named.
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
            raise UserError(f"{path}, line {number} is damaged: no JSON object")
    return rows
