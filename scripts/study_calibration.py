"""How many calibration samples does a plan need, and where do the ranks go on a real model?

Samples of each task are drawn without overlap in lots of 8, and lots are joined: so plans from 8,
16 and 32 samples are compared with plans from as many *other* samples, and A with the best that
the samples held back allow. A line of results per task and number of samples:

    python scripts/study_calibration.py --model MODEL --data tasks/gsm8k tasks/arc_easy \
        --results docs/study_calibration.jsonl

- ``same_ranks``: the share of all ranks that two plans of different samples give to the same
  modules, Σ min / Σ; mean, least and most over all pairs.
- ``captured``: the energy that A from these samples captures of W·C of 32 samples held back, over
  what the held-back samples' own A captures, both beyond the leading directions
  (``method/energy.py``); mean and least over modules.
- ``ranks``: of the plan of all samples: how they are shared out among kinds of modules.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx.core as mx
from comparison.results import append
from measuring import machine

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.data.batches import batches_in_order
from tlora_mlx.data.samples import draw_samples
from tlora_mlx.method import linalg
from tlora_mlx.method.allocation import RankPlan, plan_ranks
from tlora_mlx.method.calibration import Calibration, calibrate
from tlora_mlx.method.covariance import input_leaders
from tlora_mlx.method.energy import captured_energy
from tlora_mlx.method.layers import dense_weight, linear_shape
from tlora_mlx.method.subspace import task_subspace
from tlora_mlx.training.setup import Setup, prepare

LOT, LOTS = 8, 8


def joined(lots: Sequence[Calibration]) -> Calibration:
    """The calibration of all lots' samples, which are as many in each."""
    names, inputs = lots[0].sensitivities, lots[0].covariances
    return Calibration(
        {name: statistics.mean(lot.sensitivities[name] for lot in lots) for name in names},
        {name: sum(lot.covariances[name] for lot in lots) / len(lots) for name in inputs},
        sum(lot.samples for lot in lots),
    )


def same_ranks(one: RankPlan, other: RankPlan) -> float:
    """The share of the ranks that both give to the same modules."""
    pairs = [(m.rank, other.modules[name].rank) for name, m in one.modules.items()]
    return sum(min(pair) for pair in pairs) / sum(rank for rank, _ in pairs)


class Study:
    """One task's lots of calibration samples.

    Args:
        setup: the model and the task.
        config: its options.
    """

    def __init__(self, setup: Setup, config: TrainConfig):
        self._targets, self._rank = setup.targets, config.rank
        self._leaders = input_leaders(setup.base.model, setup.targets)
        self._shapes = {name: linear_shape(module) for name, module in setup.targets.items()}
        left, self._lots = list(setup.data["train"].samples), []
        for seed in range(LOTS):
            drawn = draw_samples(left, LOT, seed)
            left = [sample for sample in left if sample not in drawn]
            batches = [b for b in batches_in_order(drawn, 4, config.max_seq_length) if b]
            inputs = set(self._leaders.values())
            self._lots.append(calibrate(setup.base.model, setup.targets, batches, inputs))

    def of(self, lots: Sequence[int]) -> Calibration:
        """What these lots say together."""
        return joined([self._lots[i] for i in lots])

    def plan(self, lots: Sequence[int]) -> RankPlan:
        """The rank plan by these lots."""
        return plan_ranks(self.of(lots).sensitivities, self._shapes, self._rank, float(self._rank))

    def stability(self, number: int) -> dict[str, Any]:
        """Of plans and A from so many lots."""
        groups = [range(i, i + number) for i in range(0, LOTS, number)]
        plans = [self.plan(group) for group in groups]
        shares = [same_ranks(one, other) for one, other in combinations(plans, 2)]
        return {"same_ranks": [statistics.mean(shares), min(shares), max(shares)]} | {
            "captured": self._captured(groups[0])
        }

    def _captured(self, lots: Sequence[int]) -> list[float]:
        """Mean and least of what A from these lots captures of the last lots' W·C."""
        own, held = self.of(lots), self.of(range(LOTS // 2, LOTS))
        shares = []
        for name, module in self._targets.items():
            weight, leader = dense_weight(module), self._leaders[name]
            covariance = held.covariances[leader]
            a, best_a = (
                task_subspace(weight, c, self._rank) for c in (own.covariances[leader], covariance)
            )
            found, best = (linalg.svd(weight @ (covariance @ x.T))[1] for x in (a, best_a))
            leading = captured_energy(weight, covariance, best_a).leading
            tails = [mx.square(values[leading:]).sum().item() for values in (found, best)]
            shares.append(tails[0] / tails[1])
        return [statistics.mean(shares), min(shares)]

    def ranks(self) -> dict[str, Any]:
        """How the plan of all lots shares out the ranks."""
        plan = self.plan(range(LOTS))
        kinds: dict[str, list[int]] = {}
        for name, module in plan.modules.items():
            kinds.setdefault(name.rsplit(".", 1)[-1], []).append(module.rank)
        total = sum(map(sum, kinds.values()))
        uniform = self._rank * sum(out for out, _ in self._shapes.values())
        return {
            "share": {kind: sum(ranks) / total for kind, ranks in kinds.items()},
            "least": {kind: min(ranks) for kind, ranks in kinds.items()},
            "most": {kind: max(ranks) for kind, ranks in kinds.items()},
            "without": sum(rank == 0 for ranks in kinds.values() for rank in ranks),
            "largest_scale": max(m.scale for m in plan.modules.values()),
            "trained_over_uniform": plan.trained_parameters() / uniform,
        }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()

    plans = {}
    for data in args.data:
        config = TrainConfig(model=args.model, data=str(data), rank=args.rank)
        study = Study(prepare(config), config)
        head = {"task": data.name, "rank": args.rank, "machine": machine()}
        for number in (1, 2, 4):
            append(args.results, head | {"samples": number * LOT} | study.stability(number))
        append(args.results, head | {"samples": LOTS * LOT} | {"ranks": study.ranks()})
        plans[data.name] = study.plan(range(LOTS))
        del study
        mx.clear_cache()
    for one, other in combinations(plans, 2):
        share = same_ranks(plans[one], plans[other])
        found = {"tasks": [one, other], "rank": args.rank, "samples": LOTS * LOT}
        append(args.results, found | {"same_ranks": share})


if __name__ == "__main__":
    main()
