"""What ``inspect`` prints: an adapter's format, its size, and how each reader interprets it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.readers import (
    PATTERN_SOURCES,
    PORTABLE,
    Reading,
    largest_rank,
    readings_of_export,
    vllm_rank,
)
from tlora_mlx.adapters.registry import FORMATS
from tlora_mlx.invocation import suggested
from tlora_mlx.models.model_directory import family_here
from tlora_mlx.models.names import named_as_multimodal, unexportable


def described(adapter: Adapter) -> list[str]:
    """The format, the directory and the base model."""
    return [
        f"{FORMATS[adapter.source].title} in {adapter.directory}",
        f"base model: {adapter.base or 'not named'}",
    ]


def size(adapter: Adapter) -> str:
    """Parameters, dtypes, and the size on disk."""
    parameters = sum(tensor.size for tensor in adapter.tensors.values())
    dtypes = {str(t.dtype).removeprefix("mlx.core.") for t in adapter.tensors.values()}
    files = (file for file in adapter.directory.rglob("*") if file.is_file())
    return (
        f"A and B: {parameters:,} parameters, {' and '.join(sorted(dtypes))}; "
        f"{decimal(sum(file.stat().st_size for file in files))} on disk"
    )


def base_family(adapter: Adapter) -> str | None:
    """The family of an adapter's base model, if it is known on this machine."""
    return adapter.model_type or (family_here(adapter.base) if adapter.base else None)


def readers_table(found: Sequence[Reading]) -> Table | None:
    """The scale that each reader applies; None if there are no readers."""
    if not found:
        return None
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("reader", "tried with", "effective scale", ""):
        table.add_column(heading)
    for reading in found:
        verdict = reading.fault or "as intended"
        table.add_row(reading.reader, reading.tried, _scales(reading), verdict)
    return table


def _scales(reading: Reading) -> str:
    if not reading.scales:
        return "–"
    least, most = min(reading.scales.values()), max(reading.scales.values())
    return f"{least:.4g}" if least == most else f"{least:.4g} … {most:.4g}"


def advice(adapter: Adapter, found: Sequence[Reading]) -> list[str]:
    """What to do about readers that would get it wrong, and what vLLM needs.

    Args:
        adapter: as read, with its own tool's module names.
        found: how each reader of its format interprets it.
    """
    is_peft = adapter.source in PATTERN_SOURCES
    largest = largest_rank(adapter)
    needed = vllm_rank(max(largest, adapter.plan.rank) if is_peft else largest)
    vllm = f"vLLM needs --max-lora-rank {needed}"
    if needed is None:
        vllm = f"vLLM does not serve rank {largest}"
    export = suggested("export", adapter.directory)
    lines = [
        f"warning: {', '.join(readers)} would not read this adapter as intended; "
        f"for what they read: {export} {remedy}"
        for remedy, readers in _by_remedy(found).items()
    ]
    if is_peft:
        family = base_family(adapter)
        if strange := named_as_multimodal(family, adapter.plan.adapted()):
            # vLLM 0.32.0 then serves the base model without a word; PEFT warns of missing keys.
            lines.append(
                f"warning: {len(strange)} of {len(adapter.plan.adapted())} modules are named as "
                f"in a multimodal model ({strange[0]}), but the base model ('{family}') is not "
                "one: PEFT, transformers and vLLM load none of them"
            )
        if family is None:
            lines.append(
                "the base model's config.json is not on this machine, so what depends on its "
                "family is not checked"
            )
        return [*lines, vllm]
    lines.append(f"for other readers: {export} {PORTABLE}; the scale is then 1, and {vllm}")
    if adapter.model_type and not unexportable(adapter.model_type, adapter.plan.modules):
        exported = readings_of_export(adapter)
        for remedy, readers in _by_remedy(exported).items():
            lines.append(f"but for {', '.join(readers)}: {export} {remedy}")
        lines += [f"{r.reader} {r.fault}" for r in exported if r.fault and not r.remedy]
    return lines


def _by_remedy(found: Sequence[Reading]) -> dict[str, list[str]]:
    """The readers that get it wrong, by the options that help."""
    remedies: dict[str, list[str]] = {}
    for reading in found:
        if reading.remedy:
            remedies.setdefault(reading.remedy, []).append(reading.reader)
    return remedies
