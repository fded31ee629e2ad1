"""What each reader of PEFT's format would make of an adapter: its scales, and what it drops.

Readers silently disagree on ranks and scales that differ per module, on rsLoRA, on the names that
they bind and on experts. What each of them does is data (``reader_rules.READERS``).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.peft_layouts import PORTABLE_RANKS
from tlora_mlx.adapters.reader_rules import READERS, Reader
from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.method.experts import stack_and_number
from tlora_mlx.models.names import hf_weight, respelled

# The options of ``tlora export`` that make what a reader gets right.
PORTABLE, TEXT_NAMES, MERGED = "--format peft", "--format peft --names text", "--format merged"


@dataclass(frozen=True)
class Reading:
    """How one reader interprets an adapter.

    Attributes:
        reader: its name, with the versions that the rule is for.
        tried: the version that was tried, and how.
        scales: the effective scale per adapted module, 0 if the reader drops the module; empty if
            it does not load the adapter.
        fault: what is wrong, in a few words; None if the reader is right.
        remedy: the options of ``tlora export`` that help; None if the reader is right, or if it
            has no such model.
    """

    reader: str
    tried: str
    scales: dict[str, float]
    fault: str | None = None
    remedy: str | None = None


# By format: the readers that read it exactly as meant, and the formats with patterns to ignore.
OWN_READERS = {"mlx-lm": ("mlx-lm",)}
PATTERN_SOURCES = {"peft"}


def readings(adapter: Adapter, family: str | None = None) -> list[Reading]:
    """How each reader of the adapter's format interprets it; only this package reads runs.

    Args:
        adapter: as read, with its own tool's module names.
        family: the base model's ``model_type``; None if unknown, and then what depends on it is
            left out.
    """
    meant = {name: module.scale for name, module in adapter.plan.adapted().items()}
    own = [Reading(name, "", meant) for name in OWN_READERS.get(adapter.source, ())]
    others = READERS if adapter.source in PATTERN_SOURCES else ()
    return own + [_reading(adapter, reader, meant, family) for reader in others]


def readings_of_export(adapter: Adapter) -> list[Reading]:
    """How each reader would interpret the portable export of an adapter that is bound to a model.

    Raises:
        ValueError: the family or a module cannot be exported.
    """
    rank, modules = vllm_rank(largest_rank(adapter)) or PORTABLE_RANKS[-1], {}
    for name, module in adapter.plan.modules.items():
        weight = hf_weight(adapter.model_type, name)
        if weight is None:
            raise ValueError(f"{name} has no name in Hugging Face's model")
        hf = weight.module
        if weight.parameter:
            hf = f"{weight.module}.{weight.parameter}.{weight.number}"
        modules[hf] = replace(module, rank=rank, scale=1.0)
    export = replace(adapter, plan=RankPlan(rank, rank, modules), source="peft", config={})
    return readings(export, adapter.model_type)


def _reading(
    adapter: Adapter, reader: Reader, meant: dict[str, float], family: str | None
) -> Reading:
    binds = reader.binds_in.get(family, reader.binds)
    unbound = {name for name in meant if not re.search(binds, name)}
    if refusal := _refusal(adapter, reader, family):
        return Reading(reader.name, reader.tried, {}, *refusal)
    scales = _scales(adapter, reader)
    wrong = {name for name in meant if not math.isclose(scales[name], meant[name], rel_tol=1e-6)}
    remedies = {PORTABLE} if wrong else set()
    if unbound:
        remedies.add(_names_that_bind(binds, unbound, family))
    dropped = set(unbound)
    if reader.whole_kinds:
        broken, can_be_filled = _in_broken_kinds(meant.keys() - unbound)
        if broken:
            remedies.add(PORTABLE if can_be_filled and not _is_portable(adapter) else MERGED)
        dropped |= broken
    scales |= dict.fromkeys(dropped, 0.0)
    faults = [f"drops {len(dropped)} of {len(meant)} modules"] if dropped else []
    if wrong := wrong - dropped:
        faults.append(f"WRONG for {len(wrong)} of {len(meant)} modules")
    if dropped == meant.keys():
        faults = ["binds none of its modules"]
    remedy = next((r for r in (MERGED, TEXT_NAMES, PORTABLE) if r in remedies), None)
    return Reading(reader.name, reader.tried, scales, " and ".join(faults) or None, remedy)


def _refusal(adapter: Adapter, reader: Reader, family: str | None) -> tuple[str, str | None] | None:
    """Why a reader does not load the adapter, and what helps; None if it does."""
    if family in reader.unknown:
        return f"has no model '{family}'", None
    ranks = {module.rank for module in adapter.plan.adapted().values()}
    has_experts = any(stack_and_number(name)[1] is not None for name in adapter.plan.adapted())
    if family in reader.without:
        return f"loads no adapters for {family}", MERGED
    if has_experts and reader.experts and family not in reader.experts_in:
        return reader.experts, MERGED
    if reader.one_rank and ranks != {adapter.plan.rank}:
        return "does not load it: its ranks differ", PORTABLE
    if reader.names_only and isinstance(adapter.config.get("target_modules"), str):
        return "does not load it: target_modules is a regex", PORTABLE
    return None


def _scales(adapter: Adapter, reader: Reader) -> dict[str, float]:
    """The scale that a reader computes for each adapted module."""
    plan = adapter.plan
    if reader.patterns:
        return {name: module.scale for name, module in plan.adapted().items()}
    root = reader.rslora and adapter.config.get("use_rslora")
    scales = {}
    for name, module in plan.adapted().items():
        rank = module.rank if reader.over_tensor else plan.rank
        scales[name] = plan.alpha / (math.sqrt(rank) if root else rank)
    return scales


def _names_that_bind(binds: str, unbound: set[str], family: str | None) -> str:
    """The remedy for names that a reader does not bind: the family's other names, if it has any."""
    for remedy, text in ((PORTABLE, False), (TEXT_NAMES, True)):
        if all(re.search(binds, respelled(family, name, text)) for name in unbound):
            return remedy
    return MERGED


def _in_broken_kinds(names: Iterable[str]) -> tuple[set[str], bool]:
    """The modules whose kind is missing from any block up to the last adapted one.

    Also returns whether each of those blocks has other adapted modules, so that an export can add
    the missing ones.
    """
    kinds: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        if found := re.search(r"\.(\d+)\.(.+)", name):
            kinds[found[2]][int(found[1])] = name
    adapted = {block for blocks in kinds.values() for block in blocks}
    needed = set(range(max(adapted, default=-1) + 1))
    broken = [blocks for blocks in kinds.values() if needed - blocks.keys()]
    return {name for blocks in broken for name in blocks.values()}, needed == adapted


def _is_portable(adapter: Adapter) -> bool:
    """Whether it is in the portable layout, which has every module of every kind that it can."""
    plan = adapter.plan
    return all((m.rank, m.scale) == (plan.rank, 1.0) for m in plan.adapted().values())


def largest_rank(adapter: Adapter) -> int:
    """The largest rank of an adapter's modules."""
    return max((module.rank for module in adapter.plan.modules.values()), default=0)


def vllm_rank(rank: int) -> int | None:
    """The ``--max-lora-rank`` that vLLM needs for a rank; None if it serves none that large."""
    return next((served for served in PORTABLE_RANKS if served >= rank), None)
