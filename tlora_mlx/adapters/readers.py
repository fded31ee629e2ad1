"""The scale that each reader would apply to an adapter, and which of them get it wrong.

Readers silently disagree on ranks and scales that differ per module, and on rsLoRA. The rules are
from their sources: huggingface/peft ``tuners/lora/layer.py``; vllm-project/vllm
``vllm/lora/peft_helper.py``; sgl-project/sglang ``python/sglang/srt/lora/lora.py``; ggml-org's
llama.cpp ``src/llama-adapter.h``; NVIDIA/TensorRT-LLM ``tensorrt_llm/lora_manager.py``;
huggingface/text-generation-inference ``server/text_generation_server/adapters/lora.py``;
ml-explore/mlx-lm ``mlx_lm/tuner/utils.py``.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.peft_layouts import PORTABLE_RANKS


@dataclass(frozen=True)
class Reading:
    """How one reader interprets an adapter.

    Attributes:
        scales: the effective scale per adapted module, 0 if the reader drops the module; empty if
            it does not load the adapter.
        fault: what is wrong, in a few words; None if the reader is right.
    """

    reader: str
    scales: dict[str, float]
    fault: str | None


class _Rule(NamedTuple):
    """A reader of PEFT's format that ignores its patterns.

    Attributes:
        over_tensor: ``lora_alpha`` is divided by the tensor's own rank, not the configuration's.
        rslora: the reader supports ``use_rslora``.
        one_rank: all tensors must have the configuration's rank.
        names_only: ``target_modules`` must be a list of names.
        whole_kinds: a kind of module that is missing from one block is dropped in all.
    """

    over_tensor: bool
    rslora: bool
    one_rank: bool = False
    names_only: bool = False
    whole_kinds: bool = False


RULES = {
    "vLLM": _Rule(over_tensor=False, rslora=True),
    "SGLang": _Rule(over_tensor=False, rslora=False, one_rank=True, names_only=True),
    "llama.cpp": _Rule(over_tensor=True, rslora=False),
    "TensorRT-LLM": _Rule(over_tensor=True, rslora=True),
    "TGI": _Rule(over_tensor=False, rslora=True, one_rank=True, whole_kinds=True),
}


# By format: the readers that read it exactly as meant, and the formats with patterns to ignore.
OWN_READERS = {"peft": ("PEFT",), "mlx-lm": ("mlx-lm",)}
PATTERN_SOURCES = {"peft"}


def readings(adapter: Adapter) -> list[Reading]:
    """How each reader of the adapter's format interprets it; only this package reads runs."""
    meant = {name: module.scale for name, module in adapter.plan.adapted().items()}
    own = [Reading(reader, meant, None) for reader in OWN_READERS.get(adapter.source, ())]
    others = RULES if adapter.source in PATTERN_SOURCES else {}
    return own + [_reading(adapter, reader, rule, meant) for reader, rule in others.items()]


def _reading(adapter: Adapter, reader: str, rule: _Rule, meant: dict[str, float]) -> Reading:
    nominal, alpha = adapter.plan.rank, adapter.plan.alpha
    ranks = {name: module.rank for name, module in adapter.plan.adapted().items()}
    if rule.one_rank and set(ranks.values()) != {nominal}:
        return Reading(reader, {}, "does not load it: its ranks differ")
    if rule.names_only and isinstance(adapter.config.get("target_modules"), str):
        return Reading(reader, {}, "does not load it: target_modules is a regex")
    root = rule.rslora and adapter.config.get("use_rslora")
    over = {name: rank if rule.over_tensor else nominal for name, rank in ranks.items()}
    scales = {name: alpha / (math.sqrt(r) if root else r) for name, r in over.items()}
    if rule.whole_kinds:
        scales |= dict.fromkeys(_in_broken_kinds(ranks), 0.0)
    wrong = [name for name in meant if not math.isclose(scales[name], meant[name], rel_tol=1e-6)]
    fault = f"WRONG for {len(wrong)} of {len(meant)} modules" if wrong else None
    return Reading(reader, scales, fault)


def _in_broken_kinds(names: Iterable[str]) -> list[str]:
    """The modules whose kind is missing from any block up to the last adapted one."""
    kinds: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        if found := re.search(r"\.(\d+)\.(.+)", name):
            kinds[found[2]][int(found[1])] = name
    last = max((block for blocks in kinds.values() for block in blocks), default=-1)
    broken = [blocks for blocks in kinds.values() if len(blocks) <= last]
    return [name for blocks in broken for name in blocks.values()]


def vllm_rank(rank: int) -> int | None:
    """The ``--max-lora-rank`` that vLLM needs for a rank; None if it serves none that large."""
    return next((served for served in PORTABLE_RANKS if served >= rank), None)
