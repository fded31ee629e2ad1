"""Reading ``metrics.jsonl`` and other JSON lines files in a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tlora_mlx.errors import UserError
from tlora_mlx.storage.foreign import read_file


def read_lines(path: Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; none if the file does not exist.

    The last line may be incomplete: the run may still be going, or may have crashed.

    Args:
        path: the file.
        skip_damaged: skip every line that is not a JSON object, not just the last.

    Raises:
        UserError: the file cannot be read, or a line other than the last is not a JSON object (the
            message gives its number).
    """
    try:
        lines = read_file(path).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
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
