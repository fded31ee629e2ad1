"""Where the project is."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
EXAMPLE = ROOT / "examples"
