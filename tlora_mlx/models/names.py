"""From MLX module names to Hugging Face names and back, by the table of families."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache
from typing import NamedTuple

from tlora_mlx.models.families import FAMILIES, REFUSED, Family

# Where the blocks of a multimodal model's language model are: in vLLM and in transformers before
# 4.52, and in later ones.
_WRAPPED_BLOCKS = ("language_model.model.layers", "model.language_model.layers")


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


def hf_weight(model_type: str, name: str, text: bool = False) -> HFWeight | None:
    """Where an MLX module's weight is in Hugging Face's model; None if unknown.

    Args:
        model_type: the family.
        name: the module's name in MLX.
        text: for multimodal checkpoints: name the module as in the language model alone.
    """
    family = FAMILIES.get(model_type)
    match = family and re.fullmatch(rf"{re.escape(family.blocks)}\.(\d+)\.(.+)", name)
    if not match:
        return None
    block = f"{(text and family.text_blocks) or family.hf_blocks}.{match[1]}"
    if family.experts and match[2].startswith(f"{family.experts.switch}."):
        return _expert_weight(family, block, match[1], match[2])
    if match[2] not in family.linears:
        return None
    hf = family.linears[match[2]]
    return HFWeight(
        f"{block}.{hf}",
        f"{family.in_file}.{match[1]}.{family.files.get(hf, hf)}.weight",
        family.transposed,
    )


def _expert_weight(family: Family, block: str, number: str, path: str) -> HFWeight | None:
    """``hf_weight`` for the expert ``SWITCH.PROJECTION.NUMBER`` inside a block."""
    experts = family.experts
    projection, _, expert = path.removeprefix(f"{experts.switch}.").partition(".")
    if projection not in experts.projections or not expert.isdigit():
        return None
    parameter, part = experts.projections[projection]
    if experts.stacks:
        tensor = experts.stacks[parameter]
    else:
        file = experts.files[list(experts.projections).index(projection)]
        tensor = f"{expert}.{file}.weight"
    return HFWeight(
        f"{block}.{experts.module}",
        f"{family.in_file}.{number}.{experts.file}.{tensor}",
        experts.transposed,
        parameter=parameter,
        rows=None if part is None else Rows(part, experts.interleaved),
        number=int(expert),
        stacked=bool(experts.stacks),
    )


def mlx_name(model_type: str, hf_module: str) -> str | None:
    """The MLX name of a transformers module, the inverse of ``hf_weight``; None if unknown.

    A module of a multimodal model may be named as in any of its classes.
    """
    family = FAMILIES.get(model_type)
    match = family and _match_block(family, hf_module)
    name = match and _mlx_paths(model_type).get(match[2])
    return f"{family.blocks}.{match[1]}.{name}" if name else None


class MLXPart(NamedTuple):
    """A module of MLX that is part of a module of Hugging Face's model.

    Attributes:
        name: its name.
        rows: its part of the rows (of out); None: all of them.
    """

    name: str
    rows: Rows | None


def mlx_parts(model_type: str, hf_module: str) -> list[MLXPart]:
    """What a transformers module, or one expert's matrix, is in MLX; empty if unknown.

    Args:
        model_type: the family.
        hf_module: a module's name; or an expert's, which is its parameter's name and its number
            (``….experts.gate_up_proj.3``) or, as in transformers 4, its module's name
            (``….experts.3.w1``).
    """
    if name := mlx_name(model_type, hf_module):
        return [MLXPart(name, None)]
    family = FAMILIES.get(model_type)
    match = family and family.experts and _match_block(family, hf_module)
    if not match:
        return []
    experts, switch = family.experts, f"{family.blocks}.{match[1]}.{family.experts.switch}"
    parts = []
    for file, (projection, (parameter, part)) in zip(
        experts.files, experts.projections.items(), strict=True
    ):
        rows = None if part is None else Rows(part, experts.interleaved)
        if found := re.fullmatch(rf"{re.escape(experts.module)}\.{parameter}\.(\d+)", match[2]):
            parts.append(MLXPart(f"{switch}.{projection}.{found[1]}", rows))
        elif found := re.fullmatch(rf"{re.escape(experts.file)}\.(\d+)\.{file}", match[2]):
            parts.append(MLXPart(f"{switch}.{projection}.{found[1]}", None))
    return parts


def named_as_multimodal(model_type: str | None, names: Iterable[str]) -> list[str]:
    """Those of a multimodal model's names, if the family is known and not multimodal."""
    family = FAMILIES.get(model_type)
    if family is None or family.is_multimodal:
        return []
    wrapped = tuple(f"{blocks}." for blocks in _WRAPPED_BLOCKS)
    return [n for n in names if n.startswith(wrapped) and not _match_block(family, n)]


def respelled(model_type: str | None, hf_module: str, text: bool) -> str:
    """A module's name in the multimodal model, or (``text``) in its language model alone.

    The same name if the family is unknown or not multimodal.
    """
    family = FAMILIES.get(model_type)
    match = family and family.is_multimodal and _match_block(family, hf_module)
    blocks = match and (family.text_blocks if text else family.hf_blocks)
    return f"{blocks}.{match[1]}.{match[2]}" if blocks else hf_module


def _match_block(family: Family, hf_module: str) -> re.Match[str] | None:
    """The block's number and the path inside it, whichever class's name this is."""
    spellings = {family.hf_blocks, family.in_file}
    if family.is_multimodal:
        spellings |= {"model.layers", *_WRAPPED_BLOCKS}
    return re.fullmatch(rf"(?:{'|'.join(map(re.escape, spellings))})\.(\d+)\.(.+)", hf_module)


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
    paths = [re.sub(r"\.\d+\b", "", name) for name in unknown]  # an expert's is its stacked layer
    reasons = {refused[end] for path in paths for end in refused if path.endswith(f".{end}")}
    if reasons:
        others = sorted(_kinds(set(names) - set(unknown)) - _kinds(unknown))
        advice = f"; leave them out with --target-modules {' '.join(others)}" if others else ""
        return (
            f"these modules of family '{model_type}' cannot be exported: {_listed(unknown)} "
            f"({'; '.join(sorted(reasons))}){advice}"
        )
    if unknown:
        return (
            f"the Hugging Face names of these modules of family '{model_type}' are not known: "
            f"{_listed(unknown)}"
        )
    return None


def _kinds(names: Iterable[str]) -> set[str]:
    """The last components of the names, for which an expert's number does not count."""
    return {re.search(r"([^.]+)(\.\d+)?$", name)[1] for name in names}


def _listed(names: list[str]) -> str:
    """The names, or the first 20 of many: there can be hundreds of experts."""
    more = len(names) - 20
    return ", ".join(names[:20]) + (f" and {more} more" if more > 0 else "")
