"""From sensitivities to a rank plan, under a fixed budget (TLoRA, section "Allocate")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Of a dimension in MLX.
MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class ModulePlan:
    """One target module: its rank and effective scale, and what they were computed from.

    Attributes:
        rank: of A and B; 0: no adapter.
        scale: the factor of B A, the module's alpha over the *base* rank.
        sensitivity: at least 0; also 0 if unknown, as for another tool's adapter.
        out_features: W's out; W is (out, in).
        in_features: W's in.
    """

    rank: int
    scale: float
    sensitivity: float
    out_features: int
    in_features: int


@dataclass(frozen=True)
class RankPlan:
    """Ranks and scales of all target modules, including those of rank 0, first layer first.

    Attributes:
        rank: the base rank; the budget was this times the number of modules.
        alpha: the base alpha.
        modules: by full name.
    """

    rank: int
    alpha: float
    modules: dict[str, ModulePlan]

    def adapted(self) -> dict[str, ModulePlan]:
        """The modules that get an adapter: rank above 0."""
        return {name: module for name, module in self.modules.items() if module.rank > 0}

    def trained_parameters(self) -> int:
        """Σ rank·out: the entries of all B."""
        return sum(module.rank * module.out_features for module in self.modules.values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Any) -> RankPlan:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: a key is missing or a value has the wrong type; all faults in one message.
        """
        if faults := RankPlan.faults(data):
            raise ValueError("; ".join(faults))
        fields = ModulePlan.__dataclass_fields__
        modules = {
            name: ModulePlan(**{key: module[key] for key in fields})
            for name, module in data["modules"].items()
        }
        return RankPlan(data["rank"], data["alpha"], modules)

    @staticmethod
    def faults(data: Any) -> list[str]:
        """All that prevents ``from_dict`` from reading ``data``."""
        if not isinstance(data, dict) or not isinstance(data.get("modules"), dict):
            return ["it has no table 'modules'"]
        faults = []
        if not _is_whole(data.get("rank"), 1):
            faults.append(f"'rank' is not a whole number from 1 to {MAX_SIZE}")
        if not _is_number(data.get("alpha")) or data["alpha"] <= 0:
            faults.append("'alpha' is not a number above 0")
        for name, module in data["modules"].items():
            if not isinstance(module, dict):
                faults.append(f"{name} is not a table")
                continue
            faults += [
                f"'{key}' of {name} is not a whole number from {least} to {MAX_SIZE}"
                for key, least in (("rank", 0), ("out_features", 1), ("in_features", 1))
                if not _is_whole(module.get(key), least)
            ]
            if not _is_number(module.get("scale")):
                faults.append(f"'scale' of {name} is not a finite number")
            if not _is_number(module.get("sensitivity")) or module["sensitivity"] < 0:
                faults.append(f"'sensitivity' of {name} is not a number of at least 0")
        return faults


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= MAX_SIZE


def _is_number(value: Any) -> bool:
    """Whether it is a number that fits into a float: JSON's integers are unbounded."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def plan_ranks(
    sensitivities: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    alpha: float,
    max_rank: int | None = None,
) -> RankPlan:
    """Allocate ranks and scales by sensitivity.

    Args:
        sensitivities: s per module, at least 0 and finite; their order breaks ties.
        shapes: (out, in) per module.
        rank: the base rank r; the budget is r times the number of modules.
        alpha: the base alpha; a module's scale is its own alpha over the *base* rank.
        max_rank: no module gets more; without it the cap is min(out, in).

    Returns:
        The plan. Its ranks add up to the budget, unless the caps of all modules together are
        smaller: then every module gets its cap. If no cap binds, it is the authors' allocation.

    Raises:
        ValueError: a sensitivity is negative or not finite, or all are 0.

    Source: Rambo-Yi/TLora e3463ae, ``peft/tuners/lora/tlora.py::preprocess_tlora``; our caps.
    """
    bad = [name for name, s in sensitivities.items() if not (math.isfinite(s) and s >= 0)]
    if bad:
        raise ValueError(f"sensitivities are negative or not finite: {', '.join(bad)}")
    total = sum(sensitivities.values())
    if total <= 0:
        raise ValueError("all sensitivities are 0, so there is nothing to allocate ranks by")
    count = len(sensitivities)
    ranks = _authors_ranks(sensitivities, rank * count)
    caps = {n: min(*shapes[n], max_rank or math.inf) for n in sensitivities}
    ranks = _capped(ranks, caps, sensitivities)
    modules = {}
    for name, s in sensitivities.items():
        module_alpha = max(alpha, round(alpha * count * s / total))
        modules[name] = ModulePlan(ranks[name], module_alpha / rank, s, *shapes[name])
    return RankPlan(rank, alpha, modules)


def _authors_ranks(sensitivities: Mapping[str, float], budget: int) -> dict[str, int]:
    """Rounded shares; the residue is added to or taken from the largest rank, unit by unit."""
    total = sum(sensitivities.values())
    ranks = {name: round(budget * s / total) for name, s in sensitivities.items()}
    residue = budget - sum(ranks.values())
    step = 1 if residue > 0 else -1
    for _ in range(abs(residue)):
        largest = max(ranks, key=ranks.__getitem__)  # the first on a tie
        ranks[largest] += step
    return ranks


def _capped(
    ranks: Mapping[str, int], caps: Mapping[str, int], sensitivities: Mapping[str, float]
) -> dict[str, int]:
    """Cut ranks at their caps and give the excess to the others, in proportion to sensitivity.

    Each round grants the rounded-down shares, then single units by the largest remainder; a grant
    that hits a cap leaves excess for the next round.
    """
    budget = min(sum(ranks.values()), sum(caps.values()))
    ranks = {name: min(r, caps[name]) for name, r in ranks.items()}
    while (excess := budget - sum(ranks.values())) > 0:
        open_names = [name for name in ranks if ranks[name] < caps[name]]
        total = sum(sensitivities[name] for name in open_names)
        shares = {
            name: excess * (sensitivities[name] / total if total > 0 else 1 / len(open_names))
            for name in open_names
        }
        grants = {name: math.floor(share) for name, share in shares.items()}
        by_remainder = sorted(open_names, key=lambda name: grants[name] - shares[name])
        for name in by_remainder[: excess - sum(grants.values())]:
            grants[name] += 1
        for name, grant in grants.items():
            ranks[name] = min(ranks[name] + grant, caps[name])
    return ranks
