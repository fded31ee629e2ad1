"""Compare TLoRA, its ablations and LoRA, each with its own tuned learning rate.

Every method trains the same base on the same data for the same updates. Its learning rate is the
one after which the validation loss rises under the first seed, going up the grid; what is reported
is the test loss under all seeds. A seed decides on calibration samples, data order and whatever is
random in A, so methods are compared seed by seed.

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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RANK = 8
# What the others are compared with, seed by seed.
REFERENCE = "LoRA (equal parameters)"
DRAWN_BY_RATE = ["LoRA", REFERENCE, "TLoRA", "task A, uniform", "random A, uniform"]
RATES = [3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]


@dataclass(frozen=True)
class Method:
    """How A, ranks and scales come about.

    Attributes:
        a: ``task`` (W·C), ``covariance`` (C alone, as EVA), ``weight`` (W alone), ``gradient`` (the
            mean gradient of W, as LoRA-GA) or ``random`` (orthonormal); ``lora``: LoRA's own,
            random and not orthonormal.
        allocated: ranks by sensitivity; else the same for all.
        scaled: scales by sensitivity; else 1.
        train_a: A is trained too.
        floor: so large a share of the ranks is the same for all, the rest is by sensitivity.
        whitened: A's rows are scaled so that each gives A x the same variance on the samples.
        rank: the base rank.
        equal_parameters: the base rank is chosen instead, for as many trained parameters as B has
            at uniform ranks of ``RANK``.
    """

    a: str = "task"
    allocated: bool = True
    scaled: bool = True
    train_a: bool = False
    floor: float = 0.0
    whitened: bool = False
    rank: int = RANK
    equal_parameters: bool = False


UNIFORM = Method(allocated=False, scaled=False)
AT_EQUAL_RANK = {
    "LoRA": Method("lora", allocated=False, scaled=False, train_a=True),
    "random A, uniform": replace(UNIFORM, a="random"),
    "TLoRA": Method(),
    "task A, uniform": UNIFORM,
    "task A, uniform, rank 16": replace(UNIFORM, rank=16),
    "TLoRA without scaling": Method(scaled=False),
    "gradient A, uniform": replace(UNIFORM, a="gradient"),
    "covariance A, uniform": replace(UNIFORM, a="covariance"),
    "TLoRA without scaling, floor": Method(scaled=False, floor=0.5),
    "task A trained, uniform": replace(UNIFORM, train_a=True),
    "weight A, uniform": replace(UNIFORM, a="weight"),
    "random A, allocated": Method("random"),
    "task A whitened, uniform": replace(UNIFORM, whitened=True),
}
# Uniform ranks with A frozen have the reference number of trained parameters at equal rank already.
METHODS = {}
for name, method in AT_EQUAL_RANK.items():
    METHODS[name] = method
    if (method.allocated and method.a != "random" and not method.floor) or method.train_a:
        METHODS[f"{name} (equal parameters)"] = replace(method, equal_parameters=True)


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
        self._gradients: dict[int, dict[str, Any]] = {}

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

    def gradient(self, seed: int) -> dict[str, Any]:
        """Of the mean loss of the calibration samples, with respect to every target's W."""
        import mlx.core as mx
        import mlx.nn as nn
        from mlx.utils import tree_flatten, tree_map

        from tlora_mlx import pipeline
        from tlora_mlx.method.loss import masked_cross_entropy

        def loss(model: nn.Module, batch: Any) -> Any:
            losses, counts = masked_cross_entropy(model(batch.tokens), *batch)
            return (losses.sum(axis=1) / counts).sum()

        if seed not in self._gradients:
            for module in self.targets.values():
                module.unfreeze(keys="weight")
            config, total = replace(self.config, seed=seed), None
            for batch in pipeline.calibration_batches(config, self.data["train"]):
                _, found = nn.value_and_grad(self.base.model, loss)(self.base.model, batch)
                total = found if total is None else tree_map(mx.add, total, found)
                mx.eval(total)
            self.base.model.freeze()
            self._gradients[seed] = {
                name.removesuffix(".weight"): g for name, g in tree_flatten(total)
            }
        return self._gradients[seed]

    def plan(self, method: Method, seed: int) -> Any:
        """The method's rank plan."""
        if not method.equal_parameters:
            return self._plan_of_rank(method, seed, method.rank)
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
            mean = statistics.mean(measured.values())
            sensitivities = {
                name: method.floor + (1 - method.floor) * s / mean for name, s in measured.items()
            }
        plan = plan_ranks(sensitivities, shapes, rank, float(rank))
        if method.scaled:
            return plan
        return replace(plan, modules={n: replace(m, scale=1.0) for n, m in plan.modules.items()})

    def matrices(self, method: Method, plan: Any, seed: int) -> dict[str, Any]:
        """``NAME.lora_a`` (in, rank) of every adapted module."""
        import mlx.core as mx

        from tlora_mlx.method import linalg
        from tlora_mlx.method.layers import dense_weight
        from tlora_mlx.method.subspace import task_subspace, top_right_vectors

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
            elif method.a == "gradient":
                a = top_right_vectors(self.gradient(seed)[name], module.rank).T
            else:
                a = top_right_vectors(dense_weight(self.targets[name]), module.rank).T
            if method.whitened:
                variance = (a * (covariance @ a)).sum(axis=0) / tokens
                a = a / mx.sqrt(variance + 1e-6 * variance.max())
            tensors[f"{name}.lora_a"] = a
        return tensors

    def train(self, method: Method, rate: float, seed: int) -> dict[str, Any]:
        """Train once; losses, how many parameters were trained, and how long it took."""
        from tlora_mlx.errors import RunError
        from tlora_mlx.method.layers import TLoRALinear, attach, replace_modules
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
                "trained": _trained(method, plan),
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
    """Train what the results do not hold yet: the rate by the first seed, then other seeds."""
    task = {"task": args.task, "iters": args.iters}
    done = {
        (row["method"], row["rate"], row["seed"]): row["valid"]
        for row in read(args.results)
        if task.items() <= row.items()
    }
    bench = Bench(args)

    def result(name: str, rate: float, seed: int) -> float:
        if (name, rate, seed) not in done:
            row = task | {"method": name, "rate": rate, "seed": seed}
            row |= bench.train(METHODS[name], rate, seed)
            done[name, rate, seed] = row["valid"]
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
        return done[name, rate, seed]

    for name in args.methods or METHODS:
        best = args.rates[0]
        for rate in args.rates:  # upwards, until the loss rises
            if result(name, rate, 0) > result(name, best, 0):
                break
            best = rate
        for seed in range(1, args.seeds):
            result(name, best, seed)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Outcome:
    """What the runs of a method say, for one task and number of updates.

    Attributes:
        rate: the learning rate with the lowest validation loss under the first seed.
        tests: test losses at that rate, by seed.
        valids: the same of validation losses.
        by_rate: test losses of the first seed, by learning rate.
        trained: how many parameters were trained.
    """

    rate: float
    tests: dict[int, float]
    valids: dict[int, float]
    by_rate: dict[float, float]
    trained: int

    @staticmethod
    def of(rows: list[dict[str, Any]]) -> Outcome:
        """From all rows of the method."""
        first = [row for row in rows if row["seed"] == 0]
        best = min(first, key=lambda row: row["valid"])
        chosen = [row for row in rows if row["rate"] == best["rate"]]
        return Outcome(
            best["rate"],
            {row["seed"]: row["test"] for row in chosen},
            {row["seed"]: row["valid"] for row in chosen},
            {row["rate"]: row["test"] for row in first},
            best["trained"],
        )

    @property
    def median(self) -> float:
        """Of the test losses."""
        return statistics.median(self.tests.values())


def outcomes(rows: list[dict[str, Any]], task: str) -> dict[int, dict[str, Outcome]]:
    """By number of updates and method, in the order of ``METHODS``."""
    found: dict[int, dict[str, Outcome]] = {}
    for iters in sorted({row["iters"] for row in rows if row["task"] == task}):
        of_iters = [row for row in rows if row["task"] == task and row["iters"] == iters]
        found[iters] = {
            name: Outcome.of(own)
            for name in METHODS
            if (own := [row for row in of_iters if row["method"] == name])
        }
    return found


def table(args: argparse.Namespace) -> None:
    """Print a Markdown table per task and number of updates, and draw each task."""
    rows = read(args.results)
    for task in dict.fromkeys(row["task"] for row in rows):
        found = outcomes(rows, task)
        for iters, of_iters in found.items():
            if REFERENCE not in of_iters:
                sys.exit(
                    f"{task}, {iters} updates: run {REFERENCE!r}, which others are held against"
                )
            print(f"### {task}, {iters} updates\n")
            print(
                "| method | trained | best rate | test loss | less LoRA's | validation | at 3e-4 |"
            )
            print("|" + "---|" * 7)
            reference = of_iters[REFERENCE]
            for name, own in of_iters.items():
                low = f"{own.by_rate[3e-4]:.3f}" if 3e-4 in own.by_rate else ""
                print(
                    f"| {name} | {own.trained:,} | {own.rate:g} | {spread(own.tests.values())} "
                    f"| {spread(less(own.tests, reference.tests), '+')} "
                    f"| {spread(less(own.valids, reference.valids), '+')} | {low} |"
                )
            print()
        draw(task, found, args.results.with_name(f"compare_methods_{task}.png"))


def less(losses: dict[int, float], others: dict[int, float]) -> list[float]:
    """Differences, seed by seed."""
    return [losses[seed] - others[seed] for seed in losses.keys() & others.keys()]


def spread(values: Iterable[float], sign: str = "") -> str:
    """Median and range."""
    values = sorted(values)
    numbers = (f"{v:{sign}.3f}" for v in (statistics.median(values), values[0], values[-1]))
    return "{} ({} to {})".format(*numbers)


def draw(task: str, found: dict[int, dict[str, Outcome]], path: Path) -> None:
    """A column per number of updates: test losses of all methods; of some by learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(found), 9), layout="constrained")
    figure.suptitle(task)
    panels = figure.subplots(2, len(found), squeeze=False, height_ratios=[3, 2])
    for (iters, of_iters), (methods, rates) in zip(found.items(), panels.T, strict=True):
        names = sorted(of_iters, key=lambda name: -of_iters[name].median)
        for height, name in enumerate(names):
            outcome, colour = of_iters[name], f"C{int(METHODS[name].train_a)}"
            tests = outcome.tests.values()
            methods.hlines(height, min(tests), max(tests), colour)
            methods.plot(outcome.median, height, "o", color=colour)
        labels = [f"{name}, {of_iters[name].trained / 1000:.0f}k" for name in names]
        methods.set_yticks(range(len(names)), labels, fontsize="small")
        methods.set_title(f"{iters} updates (orange: A is trained too)")
        methods.set_xlabel("test loss (nats per token), median and range")
        for name in (n for n in DRAWN_BY_RATE if n in of_iters):
            points = zip(*sorted(of_iters[name].by_rate.items()), strict=True)
            rates.plot(*points, marker=".", label=name)
        rates.set_xscale("log")
        rates.set_xlabel("learning rate")
        rates.set_ylabel("test loss")
        rates.legend(fontsize="small")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


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
