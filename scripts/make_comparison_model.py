"""Make the second model and task of ``compare_methods.py``: a better-trained base, a smaller shift.

A Llama of 2.4 million parameters is trained on the source of the standard library, longer than the
shipped example. The task is narrow and of the same language: a unit test's body from its first
line, from Python's own tests, of which the model has seen none; split by file.

    python scripts/make_comparison_model.py --output comparison   # an hour on one core
"""

from __future__ import annotations

import argparse
import ast
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from make_example_model import CONFIG, make, sources, train_tokenizer

CONFIG = {
    **CONFIG,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
ROWS = {"valid": 192, "test": 384, "train": 800}


def unit_tests() -> Iterator[list[dict[str, str]]]:
    """Per file of Python's own tests, its rows: a test's first line, and its body."""
    root = Path(sysconfig.get_paths()["stdlib"]) / "test"
    for path in sorted(root.glob("test_*.py")):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines, rows = source.splitlines(), []
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.decorator_list:
                continue
            head, body = lines[node.lineno - 1], lines[node.lineno : node.end_lineno]
            if not node.name.startswith("test_") or node.body[0].lineno == node.lineno:
                continue
            code = textwrap.dedent("\n".join(body))
            if 40 <= len(code) <= 500 and head.rstrip().endswith(":"):
                rows.append(
                    {
                        "prompt": head.strip() + "\n",
                        "completion": textwrap.indent(code, "    ") + "\n",
                    }
                )
        if rows:
            yield rows


def main() -> None:
    """Collect, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("comparison"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    files = list(unit_tests())
    if not files:
        parser.error("this Python comes without its tests (the package 'test'); use another")
    random.Random(args.seed).shuffle(files)
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in ROWS}
    for rows in files:
        split = next((s for s in ROWS if len(splits[s]) < 1.3 * ROWS[s]), "train")
        splits[split] += rows
    texts = [source for _, source, _ in sources()]
    print(f"{len(texts)} files of source, {sum(map(len, texts)):,} characters")
    tokenizer = train_tokenizer(texts)
    make(args.output, CONFIG, tokenizer, texts, splits, ROWS, args.steps, args.seed)


if __name__ == "__main__":
    main()
