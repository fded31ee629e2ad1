"""Make the second model and task of ``compare_methods.py``: a better-trained base, a smaller shift.

A Llama of 2.4 million parameters is trained on the source of the standard library, longer than the
shipped example. The task is narrow and of the same language: a unit test's body from its first
line, from Python's own tests, of which the model has seen none; split by file.

    python scripts/make_comparison_model.py --output comparison   # an hour on one core
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import textwrap
from pathlib import Path

from make_example_model import CONFIG, make, parsed, sources, split_by_file, train_tokenizer

CONFIG = {
    **CONFIG,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
ROWS = {"valid": 192, "test": 384, "train": 800}


def unit_tests() -> dict[str, list[dict[str, str]]]:
    """The rows of each file of Python's own tests: a test's first line, and its body."""
    root = Path(sysconfig.get_paths()["stdlib"]) / "test"
    found = {}
    for file, source, tree in parsed(root.glob("test_*.py")):
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
            found[file] = rows
    return found


def main() -> None:
    """Collect, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("comparison"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = unit_tests()
    if not rows:
        parser.error("this Python comes without its tests (the package 'test'); use another")
    splits, _ = split_by_file(rows, ROWS, args.seed)
    texts = [source for _, source, _ in sources()]
    print(f"{len(texts)} files of source, {sum(map(len, texts)):,} characters")
    tokenizer = train_tokenizer(texts)
    make(args.output, CONFIG, tokenizer, texts, splits, ROWS, args.steps, args.seed)


if __name__ == "__main__":
    main()
