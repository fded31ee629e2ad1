"""Compare TLoRA, its ablations and LoRA, each with its own tuned learning rate.

Every method trains the same base on the same data for the same updates. Its learning rate is the
one after which the validation loss rises under the first seed, going up the grid; what is reported
is the test loss under all seeds. A seed decides on calibration samples, data order and whatever is
random in A, so methods are compared seed by seed.

    python scripts/compare_methods.py run --model examples/model --data examples/data \
        --task docstring-to-code --results docs/compare_methods.jsonl
    python scripts/compare_methods.py table --results docs/compare_methods.jsonl

``run`` appends a line per training run and skips those that are there, so it can be interrupted and
resumed. ``table`` prints Markdown and draws ``compare_methods_TASK.png`` beside the results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from comparison.methods import METHODS, RATES


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default="task")
    parser.add_argument("--iters", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8, help="base rank; name the task by it")
    parser.add_argument("--calibration-samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--all-rates", action="store_true", help="do not stop where the loss rises")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    args = parser.parse_args()
    if args.what == "table":
        from comparison.table import table

        table(args.results)
    elif args.model and args.data:
        from comparison.running import run

        run(args)
    else:
        parser.error("run needs --model and --data")
    return 0


if __name__ == "__main__":
    sys.exit(main())
