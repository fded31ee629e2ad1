"""Training runs of the comparison: one run, and each method's search for its learning rate."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from comparison.methods import BASE, METHODS, Method
from comparison.results import append, read
from comparison.starts import Starts, trained_parameters
from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.data.samples import Split
from tlora_mlx.errors import RunError
from tlora_mlx.evaluation import choices
from tlora_mlx.evaluation.rows import read_rows
from tlora_mlx.evaluation.subject import Subject, sample_losses
from tlora_mlx.method.layers import TLoRALinear, attach, replace_modules
from tlora_mlx.observer import no_advance
from tlora_mlx.training.loop import Training
from tlora_mlx.training.setup import prepare
from tlora_mlx.training.step import make_optimizer
from tlora_mlx.training.validation import evaluate


class Bench:
    """One base model and task, on which any method is trained.

    Args:
        model: the base model's directory.
        data: the directory with the splits ``train``, ``valid`` and ``test``; and
            ``choices.jsonl``, rows of ``tlora evaluate --task commonsense``, if accuracy counts.
        iters: updates of each run.
        options: further options of ``TrainConfig``.
    """

    def __init__(self, model: Path, data: Path, iters: int, **options: Any):
        self._config = TrainConfig(
            model=str(model),
            data=str(data),
            iters=iters,
            steps_per_report=iters,
            save_every=iters + 1,
            **options,
        )
        self._setup = prepare(self._config)
        self._starts = Starts(self._setup, self._config)
        self._subject = Subject(self._setup.base, "model", None, 8, 0)
        path = data / "choices.jsonl"
        self._items = choices.read(read_rows(str(path)), self._subject) if path.exists() else []

    def base(self) -> dict[str, Any]:
        """Losses and accuracy without training."""
        return self._quality(self._config)

    def train(self, method: Method, rate: float, seed: int) -> dict[str, Any]:
        """Train once: losses and accuracy, how many parameters were trained, and what it cost.

        ``start_seconds`` are those of calibration, unless a run before has calibrated with this
        seed, and of A; ``seconds`` those of the updates; ``start_cpu`` and ``cpu`` are the same on
        the processor's clock. ``peak_memory`` is that of the updates, in bytes, with the model, but
        without the statistics that are kept for other runs. ``a_moved``, where A is trained: how
        far, as a share of its norm at the start; the median over the modules.
        """
        config = replace(self._config, learning_rate=rate, seed=seed)
        model, began = self._setup.base.model, _clocks()
        plan = self._starts.plan(method, seed)
        attach(model, plan, self._starts.matrices(method, plan, seed))
        mx.eval(model.parameters())
        try:
            starts = {}
            if method.train_a:
                for name, module in model.named_modules():
                    if isinstance(module, TLoRALinear):
                        module.unfreeze(recurse=False, keys=["lora_a", "lora_b"])
                        starts[name] = module.lora_a
            kept = mx.get_active_memory() - sum(
                p.nbytes for _, p in tree_flatten(model.parameters())
            )
            start = _clocks()
            mx.reset_peak_memory()
            finite = self._fitted(config)
            end, peak = _clocks(), mx.get_peak_memory() - kept
            moved = {"a_moved": _median_change(model, starts)} if starts else {}
            quality = {"valid": math.inf, "test": math.inf}
            return {
                **(self._quality(config) if finite else quality),
                **moved,
                "rank": plan.rank,
                "trained": trained_parameters(method, plan),
                "start_seconds": start[0] - began[0],
                "seconds": end[0] - start[0],
                "start_cpu": start[1] - began[1],
                "cpu": end[1] - start[1],
                "peak_memory": peak,
            }
        finally:
            replace_modules(model, self._setup.targets)

    def _fitted(self, config: TrainConfig) -> bool:
        """Train; nothing is validated, recorded or saved on the way. Whether it stayed finite."""
        model, data = self._setup.base.model, self._setup.data
        optimizer = make_optimizer(config, model)
        try:
            Training(model, optimizer, data["train"], Split(), config).fit()
        except RunError:  # not finite
            return False
        return True

    def _quality(self, config: TrainConfig) -> dict[str, Any]:
        """The losses on the other splits, and on each test row; and which choices are right."""
        model, data = self._setup.base.model, self._setup.data
        rows = sample_losses(model, data["test"].samples, config.batch_size, no_advance)
        loss, tokens = (sum(column) for column in zip(*rows, strict=True))
        found = {
            "valid": evaluate(model, data["valid"], config, "valid", -1),
            "test": loss / tokens,
            "test_rows": [[round(loss / n, 4), n] for loss, n in rows],
        }
        if self._items:
            outputs = choices.respond(self._subject, self._items)
            found |= choices.metrics(self._items, outputs)
            right = zip(self._items, outputs, strict=True)
            found["right_rows"] = [int(o["given_normalized"] == i["answer"]) for i, o in right]
        return found


def _clocks() -> tuple[float, float]:
    """Seconds on the wall's and on the processor's clock."""
    return time.perf_counter(), time.process_time()


def _median_change(model: Any, starts: dict[str, mx.array]) -> float:
    modules = dict(model.named_modules())
    return statistics.median(
        (mx.linalg.norm(modules[name].lora_a - a) / mx.linalg.norm(a)).item()
        for name, a in starts.items()
    )


def run(args: argparse.Namespace) -> None:
    """Train what the results do not hold yet: the rate by the first seed, then the other seeds.

    Args:
        args: the command line of ``compare_methods.py``.
    """
    task = {"task": args.task, "iters": args.iters}
    done = {
        (row["method"], row["rate"], row["seed"]): row["valid"]
        for row in read(args.results)
        if task.items() <= row.items()
    }
    options = {name: getattr(args, name) for name in ("rank", "batch_size", "calibration_samples")}
    bench = Bench(args.model, args.data, args.iters, **options)

    def validation_loss(name: str, rate: float, seed: int) -> float:
        if (name, rate, seed) not in done:
            row = task | {"method": name, "rate": rate, "seed": seed}
            row |= bench.train(METHODS[name], rate, seed)
            done[name, rate, seed] = row["valid"]
            append(args.results, row)
            print(row, flush=True)
        return done[name, rate, seed]

    if (BASE, 0.0, 0) not in done:
        append(args.results, task | {"method": BASE, "rate": 0.0, "seed": 0} | bench.base())
    for name in args.methods or METHODS:
        best = args.rates[0]
        for rate in args.rates:  # upwards, until the loss rises
            if validation_loss(name, rate, 0) <= validation_loss(name, best, 0):
                best = rate
            elif not args.all_rates:
                break
        for seed in range(1, args.seeds):
            validation_loss(name, best, seed)
