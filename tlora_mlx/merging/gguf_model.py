"""Merging a run into its base model as one GGUF file, for llama.cpp, Ollama and LM Studio."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.delta import adapter_delta, float32
from tlora_mlx.adapters.proof import Errors, Proof, compare_merged, mismatch_error
from tlora_mlx.adapters.registry import resolve_adapter
from tlora_mlx.errors import UserError
from tlora_mlx.merging.dense import merge_targets
from tlora_mlx.models.gguf_settings import add_settings
from tlora_mlx.models.gguf_vocabulary import add_vocabulary
from tlora_mlx.models.llama_cpp import LlamaCppModel, Place
from tlora_mlx.models.model_directory import is_quantized
from tlora_mlx.models.tokenizer import load_tokenizer
from tlora_mlx.models.weights import ModelWeights
from tlora_mlx.observer import SILENT, Advance, Observer
from tlora_mlx.storage.blocks import OpenFile, blocks
from tlora_mlx.storage.files import Finish, new_directory
from tlora_mlx.storage.gguf_file import (
    GGML_FLOATS,
    OUTTYPES,
    ggml_type,
    gguf_decode,
    gguf_encode,
    gguf_package,
    write_gguf_header,
)
from tlora_mlx.storage.safetensors import FLOATS

MODEL = "model.gguf"


class _Part(NamedTuple):
    """One of the checkpoint's tensors, as part of a tensor of the file.

    Attributes:
        source: its name in the checkpoint.
        place: where it is in the file.
        module: the adapted module whose weight it is, if any.
    """

    source: str
    place: Place
    module: str | None


class _Tensor(NamedTuple):
    """A tensor of the file.

    Attributes:
        shape: as in the checkpoint, with experts first.
        type: ggml's type, by name.
        parts: the checkpoint's tensors that it is made of, in order: one, or one per expert.
        values: the values, float32, if it is not made of any.
    """

    shape: tuple[int, ...]
    type: str
    parts: list[_Part]
    values: np.ndarray | None = None


def export_gguf(
    adapter: Adapter | str | Path,
    output: str | Path,
    *,
    outtype: str = "f16",
    base_model: str | None = None,
    observer: Observer = SILENT,
    finish: Finish | None = None,
) -> Proof:
    """Write ``model.gguf``: a run's base model with W + scale·B·A in the adapted weights.

    The sum is computed in float32, then cast or quantized block by block as llama.cpp does;
    vectors stay float32. The tokenizer, its special tokens and the chat template are included.

    Args:
        adapter: an adapter, or the directory of a run, a PEFT adapter or an mlx-lm adapter.
        output: directory to create; must be new or empty.
        outtype: a key of ``storage.gguf_file.OUTTYPES``.
        base_model: directory or Hub repository of the full-precision base; None: the run's own.
        observer: notified of each tensor.
        finish: adds to the directory before it appears under its final name.

    Returns:
        The result of reading the file back with the package ``gguf`` and comparing its deltas.

    Raises:
        UserError: the family or the tokenizer cannot be written as GGUF, the base model is unknown,
            incomplete, quantized or of other shapes, ``output`` exists, or the package ``gguf`` is
            missing.
        RunError: writing failed, or what was read back differs; nothing is left behind.
    """
    output = Path(output)
    gguf = gguf_package()
    adapter = resolve_adapter(adapter, base_model)
    base = ModelWeights(
        adapter.base_on_hugging_face(base_model, "name the full-precision model with --base-model")
    )
    if is_quantized(base.config):
        raise UserError(
            f"model {base.name} is quantized; name the full-precision one with --base-model"
        )
    model = LlamaCppModel(adapter.model_type, base.path)
    tensors = _tensors(adapter, base, model, outtype)
    proof = _GGUFProof(output, outtype) if outtype.startswith("q") else Proof(output)
    with new_directory(output, finish) as staging:
        writer = gguf.GGUFWriter(staging / MODEL, model.family.architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(output.name)
        writer.add_file_type(gguf.LlamaFileType[OUTTYPES[outtype][1]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        extra = add_settings(writer, model)
        size = tensors["token_embd.weight"].shape[0]
        add_vocabulary(writer, load_tokenizer(base.name).tokenizer, model.config, size)
        tensors |= {name: _Tensor(v.shape, "F32", [], v) for name, v in extra.items()}
        shapes = {name: (tensor.shape, tensor.type) for name, tensor in tensors.items()}
        places = write_gguf_header(writer, shapes)
        with (
            observer.stage("merging", len(tensors)) as advance,
            OpenFile(staging / MODEL, patch=True) as file,
        ):
            for name, tensor in tensors.items():
                offset = places[name]
                for block in _blocks(base, adapter, tensor):
                    data = block.encoded(tensor.type)
                    file.write(offset, data)
                    offset += data.size
                advance()
            file.sync()
        with observer.stage("reading back", len(tensors)) as advance:
            _prove(staging / MODEL, base, adapter, tensors, proof, advance)
    return proof


class _GGUFProof(Proof):
    """What reading back a quantized file has shown."""

    def __init__(self, directory: Path, outtype: str):
        super().__init__(directory)
        self._outtype = outtype

    def summary(self) -> str:
        """One line for the user: how much of the deltas survives."""
        least = self.worst(lambda errors: -errors.surviving)
        return (
            f"verified {len(self.modules)} modules in {self._outtype}: {self.total.surviving:.1%} "
            f"of the delta survives overall, {self.modules[least].surviving:.1%} in {least}"
        )


def _tensors(
    adapter: Adapter, base: ModelWeights, model: LlamaCppModel, outtype: str
) -> dict[str, _Tensor]:
    """The file's tensors by name, in the order of the checkpoint."""
    targets = merge_targets(adapter, base)
    module_of = {tensor: name for tensor, modules in targets.items() for name in modules}
    parts: dict[str, list[_Part]] = {}
    for tensor, file in base.file_of.items():
        place = model.place(tensor)
        if place is None:
            continue
        if file.entries[tensor].dtype not in FLOATS:
            raise UserError(
                f"{tensor} of model {base.name} has dtype {file.entries[tensor].dtype}, not "
                f"{', '.join(FLOATS)}"
            )
        parts.setdefault(place.name, []).append(_Part(tensor, place, module_of.get(tensor)))
    tensors = {}
    for name, group in parts.items():
        group.sort(key=lambda part: part.place.expert or 0)
        shape = base.file_of[group[0].source].entries[group[0].source].shape
        if group[0].place.expert is not None:
            shape = (len(group), *shape)
        elif len(group) > 1:
            sources = " and ".join(part.source for part in group)
            raise UserError(f"model {base.name} has both {sources}, which are one in llama.cpp")
        tensors[name] = _Tensor(shape, ggml_type(name, shape, outtype), group)
    return tensors


class _Block(NamedTuple):
    """Some rows of a tensor, float32, in the file's order.

    Attributes:
        module: the adapted module that they belong to, if any.
        weight: the base model's.
        delta: Δ there; None if there is no adapter.
    """

    module: str | None
    weight: np.ndarray
    delta: np.ndarray | None

    def encoded(self, type: str) -> np.ndarray:
        """W + Δ as the file's bytes."""
        return gguf_encode(self.weight if self.delta is None else self.weight + self.delta, type)


def _blocks(base: ModelWeights, adapter: Adapter, tensor: _Tensor) -> Iterator[_Block]:
    """A tensor's rows in order; where rows are reordered, a whole head at a time."""
    if tensor.values is not None:
        yield _Block(None, tensor.values, None)
    for part in tensor.parts:
        file, place = base.file_of[part.source], part.place
        shape = file.entries[part.source].shape
        if len(shape) == 1:
            yield _Block(None, place.rows(float32(file[part.source])), None)
            continue
        factors = adapter_delta(adapter, part.module) if part.module else None
        ranges = blocks(*shape)
        if place.heads:
            head = shape[0] // place.heads
            ranges = ((start, start + head) for start in range(0, shape[0], head))
            place = place._replace(heads=1)
        for start, stop in ranges:
            weight = place.rows(float32(file.rows(part.source, start, stop)))
            delta = factors and place.rows(factors.rows(start, stop).product())
            yield _Block(part.module, weight, delta)


def _prove(
    path: Path,
    base: ModelWeights,
    adapter: Adapter,
    tensors: dict[str, _Tensor],
    proof: Proof,
    advance: Advance,
) -> None:
    """Read the file back with the package's own reader, and compare it with W + Δ."""
    gguf = gguf_package()
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if written.keys() != tensors.keys():
        raise mismatch_error(f"the header of {path.name}")
    for name, tensor in tensors.items():
        found, position = written[name], 0
        shape = tuple(int(size) for size in reversed(found.shape))
        if (shape, found.tensor_type.name) != (tensor.shape, tensor.type):
            raise mismatch_error(f"the header of {path.name}")
        data = found.data.reshape(-1).view(np.uint8)
        for block in _blocks(base, adapter, tensor):
            expected = block.encoded(tensor.type)
            stored = np.array(data[position : position + expected.size])
            position += expected.size
            after = gguf_decode(stored, block.weight.shape, tensor.type)
            if not np.isfinite(after).all():
                raise UserError(
                    f"{name} overflows {tensor.type.lower()}; choose --outtype bf16 or f32"
                )
            if block.delta is not None and tensor.type in GGML_FLOATS:
                dtype = GGML_FLOATS[tensor.type]
                errors = compare_merged(name, block.weight, after, block.delta, dtype)
                proof.add(block.module, errors)
                continue
            if not np.array_equal(stored, expected):
                raise mismatch_error(name)
            if block.delta is not None:
                error = after - block.weight - block.delta
                proof.add(block.module, Errors.of(error, block.delta))
        advance()
