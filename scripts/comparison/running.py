"""Training runs of the comparison: one run, and each method's search for its learning rate."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparison.methods import METHODS, RANK, Method
from comparison.results import append, read
from comparison.starts import Starts, trained_parameters
from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.data.samples import Split
from tlora_mlx.errors import RunError
from tlora_mlx.method.layers import TLoRALinear, attach, replace_modules
from tlora_mlx.training.loop import Training
from tlora_mlx.training.setup import prepare
from tlora_mlx.training.step import make_optimizer
from tlora_mlx.training.validation import evaluate


class Bench:
    """One base model and task, on which any method is trained.

    Args:
        model: the base model's directory.
        data: the directory with the splits ``train``, ``valid`` and ``test``.
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
            rank=RANK,
            **options,
        )
        self._setup = prepare(self._config)
        self._starts = Starts(self._setup, self._config)

    def train(self, method: Method, rate: float, seed: int) -> dict[str, Any]:
        """Train once; losses, how many parameters were trained, and how long it took."""
        config = replace(self._config, learning_rate=rate, seed=seed)
        model, plan = self._setup.base.model, self._starts.plan(method, seed)
        attach(model, plan, self._starts.matrices(method, plan, seed))
        try:
            if method.train_a:
                for module in model.modules():
                    if isinstance(module, TLoRALinear):
                        module.unfreeze(recurse=False, keys=["lora_a", "lora_b"])
            start = time.perf_counter()
            losses = self._fitted_losses(config)
            return {
                **losses,
                "rank": plan.rank,
                "trained": trained_parameters(method, plan),
                "seconds": time.perf_counter() - start,
            }
        finally:
            replace_modules(model, self._setup.targets)

    def _fitted_losses(self, config: TrainConfig) -> dict[str, float]:
        """Losses on the other splits after training; infinite where training did not stay finite.

        Nothing is validated, recorded or saved on the way.
        """
        model, data = self._setup.base.model, self._setup.data
        optimizer = make_optimizer(config, model)
        try:
            Training(model, optimizer, data["train"], Split(), config).fit()
            return {
                split: evaluate(model, data[split], config, split, -1)
                for split in ("valid", "test")
            }
        except RunError:  # not finite
            return {"valid": math.inf, "test": math.inf}


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
    options = {name: getattr(args, name) for name in ("batch_size", "calibration_samples")}
    bench = Bench(args.model, args.data, args.iters, **options)

    def validation_loss(name: str, rate: float, seed: int) -> float:
        if (name, rate, seed) not in done:
            row = task | {"method": name, "rate": rate, "seed": seed}
            row |= bench.train(METHODS[name], rate, seed)
            done[name, rate, seed] = row["valid"]
            append(args.results, row)
            print(row, flush=True)
        return done[name, rate, seed]

    for name in args.methods or METHODS:
        best = args.rates[0]
        for rate in args.rates:  # upwards, until the loss rises
            if validation_loss(name, rate, 0) <= validation_loss(name, best, 0):
                best = rate
            elif not args.all_rates:
                break
        for seed in range(1, args.seeds):
            validation_loss(name, best, seed)
