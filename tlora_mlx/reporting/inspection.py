"""What ``inspect`` prints: an adapter's format, its size, and how each reader interprets it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.readers import PATTERN_SOURCES, Reading, readings, vllm_rank
from tlora_mlx.adapters.registry import FORMATS
from tlora_mlx.invocation import suggested


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


def readers_table(adapter: Adapter) -> Table | None:
    """The scale that each reader applies; None if only this package reads the format."""
    found = readings(adapter)
    if not found:
        return None
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("reader", "effective scale", ""):
        table.add_column(heading, no_wrap=True)
    for reading in found:
        table.add_row(reading.reader, _scales(reading), reading.fault or "as intended")
    return table


def _scales(reading: Reading) -> str:
    if not reading.scales:
        return "–"
    least, most = min(reading.scales.values()), max(reading.scales.values())
    return f"{least:.4g}" if least == most else f"{least:.4g} … {most:.4g}"


def advice(adapter: Adapter) -> list[str]:
    """What to do about readers that would get it wrong, and what vLLM needs."""
    is_peft = adapter.source in PATTERN_SOURCES
    largest = max((m.rank for m in adapter.plan.modules.values()), default=0)
    largest = max(largest, adapter.plan.rank) if is_peft else largest
    needed = vllm_rank(largest)
    vllm = f"vLLM needs --max-lora-rank {needed}"
    if needed is None:
        vllm = f"vLLM does not serve rank {largest}"
    export = suggested("export", adapter.directory, "--format", "peft")
    wrong = [reading.reader for reading in readings(adapter) if reading.fault]
    lines = []
    if wrong:
        lines.append(
            f"warning: {', '.join(wrong)} would not read this adapter as intended; for a "
            f"directory that all readers interpret alike: {export}"
        )
    if is_peft:
        return [*lines, vllm]
    return [*lines, f"for other readers: {export}; the scale is then 1, and {vllm}"]
