"""From an MLX module name to Hugging Face's and back, by the table of families."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import NamedTuple

from tlora_mlx.models.families import FAMILIES, REFUSED, Family


class Rows(NamedTuple):
    """One of two parts of the rows of a matrix: a half, or every other row."""

    part: int
    interleaved: bool

    def slice(self, rows: int) -> slice:
        """The rows, of so many in all."""
        if self.interleaved:
            return slice(self.part, None, 2)
        return slice(self.part * rows // 2, (self.part + 1) * rows // 2)


class HFWeight(NamedTuple):
    """Where a module's weight is on Hugging Face's side.

    Attributes:
        module: its path in the model of transformers, which is what PEFT adapts.
        tensor: its weight's name in the checkpoint's safetensors files: those on the Hub, and what
            ``save_pretrained`` writes, which are not always the model's own names.
        transposed: the tensor is (in, out), not (out, in).
        parameter: of an expert, the module's parameter that holds all experts' weights.
        rows: of an expert, which of the parameter's rows (of out) are its: those of the gate or of
            up where they are fused.
        number: of an expert, which it is.
        stacked: the tensor is all experts', (experts, …), with the parameter's rows.
    """

    module: str
    tensor: str
    transposed: bool = False
    parameter: str | None = None
    rows: Rows | None = None
    number: int | None = None
    stacked: bool = False


def hf_weight(model_type: str, name: str) -> HFWeight | None:
    """Where the weight of an MLX module is on Hugging Face's side; None where it is not known."""
    family = FAMILIES.get(model_type)
    match = family and re.fullmatch(rf"{re.escape(family.blocks)}\.(\d+)\.(.+)", name)
    if match and family.experts and match[2].startswith(f"{family.experts.switch}."):
        return _expert_weight(family, match[1], match[2])
    if not match or match[2] not in family.linears:
        return None
    hf = family.linears[match[2]]
    return HFWeight(
        f"{family.hf_blocks}.{match[1]}.{hf}",
        f"{family.file_blocks or family.hf_blocks}.{match[1]}.{family.files.get(hf, hf)}.weight",
        family.transposed,
    )


def _expert_weight(family: Family, block: str, path: str) -> HFWeight | None:
    """Of ``SWITCH.PROJECTION.NUMBER`` inside of a block."""
    experts = family.experts
    projection, _, number = path.removeprefix(f"{experts.switch}.").partition(".")
    if projection not in experts.projections or not number.isdigit():
        return None
    parameter, part = experts.projections[projection]
    if experts.stacks:
        tensor = experts.stacks[parameter]
    else:
        file = experts.files[list(experts.projections).index(projection)]
        tensor = f"{number}.{file}.weight"
    return HFWeight(
        f"{family.hf_blocks}.{block}.{experts.module}",
        f"{family.file_blocks or family.hf_blocks}.{block}.{experts.file}.{tensor}",
        experts.transposed,
        parameter=parameter,
        rows=None if part is None else Rows(part, experts.interleaved),
        number=int(number),
        stacked=bool(experts.stacks),
    )


def mlx_name(model_type: str, hf_module: str) -> str | None:
    """The MLX module of a module of transformers, by ``hf_weight`` backwards; None if not known."""
    family = FAMILIES.get(model_type)
    match = family and re.fullmatch(rf"{re.escape(family.hf_blocks)}\.(\d+)\.(.+)", hf_module)
    name = match and _backwards(model_type).get(match[2])
    return f"{family.blocks}.{match[1]}.{name}" if name else None


@cache
def _backwards(model_type: str) -> dict[str, str]:
    return {hf: mlx for mlx, hf in FAMILIES[model_type].linears.items()}


def unexportable(model_type: str, names: Collection[str]) -> str | None:
    """Why these modules cannot be exported, in one sentence; None where they can."""
    if model_type in REFUSED:
        return f"model family '{model_type}' cannot be exported: {REFUSED[model_type]}"
    if model_type not in FAMILIES:
        return (
            f"the Hugging Face names of model family '{model_type}' are not known "
            f"(known: {', '.join(sorted(FAMILIES))})"
        )
    unknown = [name for name in names if hf_weight(model_type, name) is None]
    refused = FAMILIES[model_type].refused
    paths = [re.sub(r"\.\d+$", "", name) for name in unknown]  # of an expert, its stacked layer
    reasons = {refused[end] for path in paths for end in refused if path.endswith(f".{end}")}
    if reasons:
        return (
            f"these modules of family '{model_type}' cannot be exported: {_some(unknown)} "
            f"({'; '.join(sorted(reasons))}); leave them out with --target-modules"
        )
    if unknown:
        return (
            f"the Hugging Face names of these modules of family '{model_type}' are not known: "
            f"{_some(unknown)}"
        )
    return None


def _some(names: list[str]) -> str:
    """The names, or the first of many: experts make hundreds."""
    more = len(names) - 20
    return ", ".join(names[:20]) + (f" and {more} more" if more > 0 else "")
