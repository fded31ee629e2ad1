"""From MLX module names to Hugging Face names and back, by the table of families."""

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
        """The slice of this part, out of ``rows`` rows."""
        if self.interleaved:
            return slice(self.part, None, 2)
        return slice(self.part * rows // 2, (self.part + 1) * rows // 2)


class HFWeight(NamedTuple):
    """Where a module's weight is in Hugging Face's model and checkpoint.

    Attributes:
        module: its path in transformers' model, which is what PEFT adapts.
        tensor: its weight's name in safetensors checkpoints, both those on the Hub and those that
            ``save_pretrained`` writes; not always the model's own name.
        transposed: the tensor is (in, out), not (out, in).
        parameter: for an expert, the module's parameter that holds all experts' weights.
        rows: for an expert, its part of the parameter's rows (of out) if gate and up are fused.
        number: for an expert, its number.
        stacked: the tensor holds all experts, (experts, …), with the parameter's rows.
    """

    module: str
    tensor: str
    transposed: bool = False
    parameter: str | None = None
    rows: Rows | None = None
    number: int | None = None
    stacked: bool = False


def hf_weight(model_type: str, name: str) -> HFWeight | None:
    """Where an MLX module's weight is in Hugging Face's model; None if unknown."""
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
    """``hf_weight`` for the expert ``SWITCH.PROJECTION.NUMBER`` inside a block."""
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
    """The MLX name of a transformers module, the inverse of ``hf_weight``; None if unknown."""
    family = FAMILIES.get(model_type)
    match = family and re.fullmatch(rf"{re.escape(family.hf_blocks)}\.(\d+)\.(.+)", hf_module)
    name = match and _mlx_paths(model_type).get(match[2])
    return f"{family.blocks}.{match[1]}.{name}" if name else None


@cache
def _mlx_paths(model_type: str) -> dict[str, str]:
    """From transformers' paths inside a block to MLX's."""
    return {hf: mlx for mlx, hf in FAMILIES[model_type].linears.items()}


def unexportable(model_type: str, names: Collection[str]) -> str | None:
    """Why these modules cannot be exported, in one sentence; None if they can."""
    if model_type in REFUSED:
        return f"model family '{model_type}' cannot be exported: {REFUSED[model_type]}"
    if model_type not in FAMILIES:
        return (
            f"the Hugging Face names of model family '{model_type}' are not known "
            f"(known: {', '.join(sorted(FAMILIES))})"
        )
    unknown = [name for name in names if hf_weight(model_type, name) is None]
    refused = FAMILIES[model_type].refused
    paths = [re.sub(r"\.\d+$", "", name) for name in unknown]  # an expert's is its stacked layer
    reasons = {refused[end] for path in paths for end in refused if path.endswith(f".{end}")}
    if reasons:
        return (
            f"these modules of family '{model_type}' cannot be exported: {_listed(unknown)} "
            f"({'; '.join(sorted(reasons))}); leave them out with --target-modules"
        )
    if unknown:
        return (
            f"the Hugging Face names of these modules of family '{model_type}' are not known: "
            f"{_listed(unknown)}"
        )
    return None


def _listed(names: list[str]) -> str:
    """The names, or the first 20 of many: there can be hundreds of experts."""
    more = len(names) - 20
    return ", ".join(names[:20]) + (f" and {more} more" if more > 0 else "")
