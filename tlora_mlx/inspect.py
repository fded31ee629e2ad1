"""``python -m tlora_mlx.inspect``: what an adapter directory holds, and who would read it right."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tlora_mlx.config import InspectCommand, parse
from tlora_mlx.errors import run_command

if TYPE_CHECKING:
    from tlora_mlx.importing.adapter import Adapter
    from tlora_mlx.importing.readers import Reading

DESCRIPTION = "Describe an adapter directory: a run of tlora_mlx.train, PEFT's or mlx-lm's."
FORMATS = {
    "tlora": "run of tlora_mlx.train",
    "peft": "PEFT LoRA adapter",
    "mlx-lm": "mlx-lm adapter",
}


def inspect(config: InspectCommand) -> None:
    """Print format, base model, ranks, size, and the scale by which each reader takes it.

    Raises:
        UserError: it is no adapter, not whole, or more than LoRA on linear layers.
    """
    from tlora_mlx.importing.read import read_adapter
    from tlora_mlx.terminal import say
    from tlora_mlx.training.progress import print_plan

    adapter = read_adapter(config.path)
    say(f"{FORMATS[adapter.format]} in {adapter.path}")
    say(f"base model: {adapter.base or 'not named'}")
    print_plan(adapter.plan)
    say(_size(adapter))
    _say_readers(adapter)


def _size(adapter: Adapter) -> str:
    parameters = sum(tensor.size for tensor in adapter.tensors.values())
    dtypes = {str(t.dtype).removeprefix("mlx.core.") for t in adapter.tensors.values()}
    size = sum(file.stat().st_size for file in adapter.path.rglob("*") if file.is_file())
    return (
        f"A and B: {parameters:,} parameters, {' and '.join(sorted(dtypes))}; "
        f"{size / 1e6:.2f} MB on disk"
    )


def _say_readers(adapter: Adapter) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from tlora_mlx.importing.readers import readings, vllm_rank
    from tlora_mlx.terminal import console, say

    found = readings(adapter)
    largest = max((m.rank for m in adapter.plan.modules.values()), default=0)
    if adapter.format == "peft":
        largest = max(largest, adapter.plan.rank)
    needed = vllm_rank(largest)
    vllm = f"vLLM needs --max-lora-rank {needed}"
    if needed is None:
        vllm = f"vLLM serves no rank of {largest}"
    if found:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in ("reader", "effective scale", ""):
            table.add_column(heading, no_wrap=True)
        for reading in found:
            table.add_row(reading.reader, _scales(reading), reading.fault or "as meant")
        console.print(table)
    wrong = [reading.reader for reading in found if reading.fault]
    if wrong:
        say(
            f"warning: {', '.join(wrong)} would not read this adapter as it is meant; for a "
            f"directory that all of them read alike: python -m tlora_mlx.export {adapter.path} "
            "--format peft"
        )
    if adapter.format == "peft":
        say(vllm)
    else:
        say(
            f"other readers take what python -m tlora_mlx.export {adapter.path} --format peft "
            f"makes of it, by scale 1; {vllm} for it"
        )


def _scales(reading: Reading) -> str:
    if not reading.scales:
        return "–"
    least, most = min(reading.scales.values()), max(reading.scales.values())
    return f"{least:.4g}" if least == most else f"{least:.4g} … {most:.4g}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(lambda: inspect(parse(InspectCommand, "tlora inspect", DESCRIPTION, argv)))


if __name__ == "__main__":
    sys.exit(main())
