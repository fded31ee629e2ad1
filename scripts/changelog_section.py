"""Print a version's section of CHANGELOG.md, as the text of its release.

    python scripts/changelog_section.py v0.1.0

The tag must name the package's version, and the section must not say "unreleased".
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def section(changelog: str, version: str) -> str:
    """The text below a version's heading, up to the next one.

    Raises:
        SystemExit: there is no such section, or it is unreleased.
    """
    parts = re.split(r"^## (.+)$", changelog, flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    heading = next((title for title in texts if title.split(" ")[0] == version), None)
    if heading is None:
        raise SystemExit(f"CHANGELOG.md has no section '## {version}'")
    if "unreleased" in heading:
        raise SystemExit(f"CHANGELOG.md still calls {version} unreleased; put the date there")
    return texts[heading].strip() + "\n"


def main() -> None:
    """Check that the tag names the package's version, and print its section."""
    tag = sys.argv[1].removeprefix("v")
    source = (ROOT / "tlora_mlx/version.py").read_text()
    version = re.search(r'__version__ = "(.+)"', source)[1]
    if tag != version:
        raise SystemExit(f"the tag says {tag}, but tlora_mlx/version.py says {version}")
    print(section((ROOT / "CHANGELOG.md").read_text(), version), end="")


if __name__ == "__main__":
    main()
