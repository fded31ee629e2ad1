"""Compare TLoRA, its ablations and LoRA, each with its own tuned learning rate.

Every method trains the same base on the same data for the same updates. Its learning rate is the
one of the grid with the lowest validation loss under the first seed; what is reported is the test
loss under all seeds. A seed decides on calibration samples, data order and whatever is random in A.

    python scripts/compare_methods.py run --model examples/model --data examples/data \
        --task docstring-to-code --results docs/compare_methods.jsonl
    python scripts/compare_methods.py table --results docs/compare_methods.jsonl

``run`` appends a line per training run and skips those that are there, so it can be cut and gone on
with. ``table`` prints Markdown and draws ``compare_methods_TASK.png`` beside the results.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RANK = 8
RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


@dataclass(frozen=True)
class Method:
    """How A, ranks and scales come about.

    Attributes:
        a: ``task`` (W·C), ``covariance`` (C alone, as EVA), ``weight`` (W alone) or ``random``
            (orthonormal); ``lora``: LoRA's own, random and not orthonormal.
        allocated: ranks by sensitivity; else the same for all.
        scaled: scales by sensitivity; else 1.
        train_a: A is trained too.
        power: of the sensitivities before they are shared out; below 1 evens them out.
        whitened: A's rows are scaled so that each gives A x the same variance on the samples.
        equal_parameters: the base rank is chosen for as many trained parameters as B has at
            uniform ranks of ``RANK``; else it is ``RANK``.
    """

    a: str = "task"
    allocated: bool = True
    scaled: bool = True
    train_a: bool = False
    power: float = 1.0
    whitened: bool = False
    equal_parameters: bool = False


UNIFORM = Method(allocated=False, scaled=False)
AT_EQUAL_RANK = {
    "LoRA": Method("lora", allocated=False, scaled=False, train_a=True),
    "random A": replace(UNIFORM, a="random"),
    "TLoRA": Method(),
    "task A, uniform ranks": UNIFORM,
    "random A, allocated": Method("random"),
    "TLoRA without scaling": Method(scaled=False),
    "A of covariance, uniform": replace(UNIFORM, a="covariance"),
    "A of weight, uniform": replace(UNIFORM, a="weight"),
    "task A whitened, uniform": replace(UNIFORM, whitened=True),
    "TLoRA without scaling, whitened": Method(scaled=False, whitened=True),
    "TLoRA without scaling, square-root shares": Method(scaled=False, power=0.5),
    "TLoRA without scaling, square-root shares, whitened": Method(
        scaled=False, power=0.5, whitened=True
    ),
}
# Uniform ranks with A frozen have the reference number of trained parameters at equal rank already.
METHODS = AT_EQUAL_RANK | {
    f"{name} (equal parameters)": replace(method, equal_parameters=True)
    for name, method in AT_EQUAL_RANK.items()
    if method.allocated or method.train_a
}


class Bench:
    """One base model and task, and the calibration of each seed."""

    def __init__(self, args: argparse.Namespace):
        from tlora_mlx import pipeline
        from tlora_mlx.config import TrainConfig
        from tlora_mlx.method.covariance import input_leaders
        from tlora_mlx.terminal import console

        console.quiet = True
        self.config = TrainConfig(
            model=str(args.model),
            data=str(args.data),
            iters=args.iters,
            batch_size=8,
            steps_per_report=args.iters,
            save_every=args.iters + 1,
            rank=RANK,
        )
        self.base, self.data, self.targets = pipeline.load(self.config)
        self.leaders = input_leaders(self.base.model, self.targets)
        self._calibrations: dict[int, Any] = {}

    def calibration(self, seed: int) -> Any:
        """Sensitivities and covariances, and the mean number of tokens of the samples."""
        from tlora_mlx import pipeline
        from tlora_mlx.method.calibration import calibrate

        if seed not in self._calibrations:
            config = replace(self.config, seed=seed)
            batches = pipeline.calibration_batches(config, self.data["train"])
            leaders = set(self.leaders.values())
            result = calibrate(self.base.model, self.targets, batches, leaders)
            tokens = sum(batch.spans[:, 1].sum().item() for batch in batches)
            self._calibrations[seed] = (result, tokens / result.samples)
        return self._calibrations[seed]

    def plan(self, method: Method, seed: int) -> Any:
        """The method's rank plan; with ``equal_parameters``, of the nearest base rank."""
        if not method.equal_parameters:
            return self._plan_of_rank(method, seed, RANK)
        wanted = RANK * sum(self._shape(name)[0] for name in self.targets)
        plans = [self._plan_of_rank(method, seed, rank) for rank in range(1, 4 * RANK)]
        return min(plans, key=lambda plan: abs(_trained(method, plan) - wanted))

    def _shape(self, name: str) -> tuple[int, int]:
        from tlora_mlx.method.layers import linear_shape

        return linear_shape(self.targets[name])

    def _plan_of_rank(self, method: Method, seed: int, rank: int) -> Any:
        from tlora_mlx.method.allocation import plan_ranks

        shapes = {name: self._shape(name) for name in self.targets}
        sensitivities = dict.fromkeys(shapes, 1.0)
        if method.allocated:
            measured = self.calibration(seed)[0].sensitivities
            sensitivities = {name: s**method.power for name, s in measured.items()}
        plan = plan_ranks(sensitivities, shapes, rank, float(rank))
        if method.scaled:
            return plan
        return replace(plan, modules={n: replace(m, scale=1.0) for n, m in plan.modules.items()})

    def matrices(self, method: Method, plan: Any, seed: int) -> dict[str, Any]:
        """``NAME.lora_a`` (in, rank) of every adapted module."""
        import mlx.core as mx

        from tlora_mlx.method import linalg
        from tlora_mlx.method.layers import dense_weight
        from tlora_mlx.method.subspace import task_subspace

        calibration, tokens = self.calibration(seed)
        tensors = {}
        for number, (name, module) in enumerate(plan.adapted().items()):
            shape = (module.in_features, module.rank)
            key = mx.random.key(1000 * seed + number)
            covariance = calibration.covariances[self.leaders[name]]
            if method.a == "lora":  # as mlx-lm draws it
                bound = 1 / math.sqrt(module.in_features)
                a = mx.random.uniform(-bound, bound, shape, key=key)
            elif method.a == "random":
                a, _ = linalg.qr(mx.random.normal(shape, key=key))
            elif method.a == "task":
                a = task_subspace(dense_weight(self.targets[name]), covariance, module.rank).T
            elif method.a == "covariance":
                a = task_subspace(mx.eye(module.in_features), covariance, module.rank).T
            else:
                weight = dense_weight(self.targets[name])
                a = task_subspace(weight, mx.eye(module.in_features), module.rank).T
            if method.whitened:
                variance = (a * (covariance @ a)).sum(axis=0) / tokens
                a = a / mx.sqrt(variance + 1e-6 * variance.max())
            tensors[f"{name}.lora_a"] = a
        return tensors

    def train(self, method: Method, rate: float, seed: int) -> dict[str, Any]:
        """Train once; losses, how many parameters were trained, and how long it took."""
        from tlora_mlx.errors import RunError
        from tlora_mlx.method.layers import (
            TLoRALinear,
            attach,
            replace_modules,
            trained_parameters,
        )
        from tlora_mlx.training.checkpoint import Progress
        from tlora_mlx.training.data import Split
        from tlora_mlx.training.loop import evaluate, fit, make_optimizer

        config = replace(self.config, learning_rate=rate, seed=seed)
        model, plan = self.base.model, self.plan(method, seed)
        attach(model, plan, self.matrices(method, plan, seed))
        try:
            if method.train_a:
                for module in model.modules():
                    if isinstance(module, TLoRALinear):
                        module.unfreeze(recurse=False, keys=["lora_a", "lora_b"])
            start = time.perf_counter()
            try:
                optimizer = make_optimizer(config, model)
                fit(model, optimizer, self.data["train"], Split(), config, Progress(), _Nowhere())
                losses = {
                    split: evaluate(model, self.data[split], config, split, -1)
                    for split in ("valid", "test")
                }
            except RunError:  # not finite
                losses = {"valid": math.inf, "test": math.inf}
            return {
                **losses,
                "rank": plan.rank,
                "trained": trained_parameters(model),
                "seconds": time.perf_counter() - start,
            }
        finally:
            replace_modules(model, self.targets)


def _trained(method: Method, plan: Any) -> int:
    return sum(
        m.rank * (m.out_features + (m.in_features if method.train_a else 0))
        for m in plan.modules.values()
    )


class _Nowhere:
    """Takes a run's reports and states, and keeps none."""

    def report(self, metrics: dict) -> None:
        pass

    def checkpoint(self, *_: object) -> None:
        pass

    def best(self, _: object) -> None:
        pass


def run(args: argparse.Namespace) -> None:
    """Train what the results do not hold yet: all rates by the first seed, then other seeds."""
    rows = [row for row in read(args.results) if row["task"] == args.task]
    done = {(row["method"], row["rate"], row["seed"]): row["valid"] for row in rows}
    bench = Bench(args)

    def result(name: str, rate: float, seed: int) -> float:
        if (name, rate, seed) not in done:
            row = {"task": args.task, "method": name, "rate": rate, "seed": seed}
            row |= bench.train(METHODS[name], rate, seed)
            done[name, rate, seed] = row["valid"]
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
        return done[name, rate, seed]

    for name in args.methods or METHODS:
        best = min(args.rates, key=lambda rate: result(name, rate, 0))
        for seed in range(1, args.seeds):
            result(name, best, seed)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(args: argparse.Namespace) -> None:
    """Print a Markdown table per task, and draw its losses against the learning rate."""
    rows = read(args.results)
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        print(f"### {task}\n")
        print("| method | rank | trained | best rate | test loss, median (range) | at 3e-4 |")
        print("|---|---|---|---|---|---|")
        for name in [n for n in METHODS if any(r["method"] == n for r in of_task)]:
            own = [row for row in of_task if row["method"] == name]
            first = {row["rate"]: row for row in own if row["seed"] == 0}
            best = min(first.values(), key=lambda row: row["valid"])
            tests = sorted(row["test"] for row in own if row["rate"] == best["rate"])
            spread = f"{statistics.median(tests):.3f} ({tests[0]:.3f} to {tests[-1]:.3f})"
            low = f"{first[3e-4]['test']:.3f}" if 3e-4 in first else ""
            print(
                f"| {name} | {best['rank']} | {best['trained']:,} | {best['rate']:g} | {spread} "
                f"| {low} |"
            )
        print()
        draw(task, of_task, args.results.with_name(f"compare_methods_{task}.png"))


def draw(task: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Test loss against learning rate, one line a method, first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = sorted(
            (r["rate"], r["test"]) for r in rows if r["method"] == name and r["seed"] == 0
        )
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot(*zip(*points, strict=True), style, marker=".", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("test loss (nats per token)")
    axes.set_title(task)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


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
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    args = parser.parse_args()
    if args.what == "run" and not (args.model and args.data):
        parser.error("run needs --model and --data")
    run(args) if args.what == "run" else table(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
