"""The task that a merged model has to keep: the adapted model, and samples of the user's data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.adapters.adapter import Adapter
from tlora_mlx.adapters.loading import load_adapter
from tlora_mlx.adapters.run import RUN
from tlora_mlx.config.parsing import from_keywords
from tlora_mlx.config.training_options import PlanConfig, TrainConfig
from tlora_mlx.data.batches import batches_in_order
from tlora_mlx.data.samples import Sample, draw_samples
from tlora_mlx.errors import RunError, UserError
from tlora_mlx.evaluation.survival import TaskLosses
from tlora_mlx.merging.conversion import StoredWeight
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.curvature import Curvature, curvatures, slopes
from tlora_mlx.method.layers import (
    LINEAR_TYPES,
    adapters_off,
    dense_weight,
    detach,
    linear_shape,
    replace_modules,
    target_linears,
)
from tlora_mlx.models.base_model import BaseModel
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.storage.safetensors import TensorFile
from tlora_mlx.training.memory import end_stage
from tlora_mlx.training.planning import allowed_memory
from tlora_mlx.training.setup import enable_grad_checkpoint, read_data
from tlora_mlx.training.validation import mean_loss

T = TypeVar("T")


class AdaptedTask:
    """An adapter on its quantized model, and the samples that say what matters.

    Attributes:
        memory: bytes that the modules' curvatures may take.
        tokens: how many of the calibration samples' tokens count.
        adapted: the adapter's loss per token on them, once there are curvatures.
        goal: that on the samples to check by, once it is merged.

    Args:
        base: the model with the adapter attached.
        calibration: the samples to take curvatures and gradients from.
        check: others, which say how far to go along a gradient.
        measured: the samples to measure the loss on.
        split: of which split those are, as messages say it.
        config: how samples are put into batches.
        memory: bytes.
        observer: notified of the progress.
    """

    def __init__(
        self,
        base: BaseModel,
        calibration: Sequence[Sample],
        check: Sequence[Sample],
        measured: Sequence[Sample],
        split: str,
        config: PlanConfig,
        memory: int,
        observer: Observer = SILENT,
    ):
        self._model, self._calibration = base.model, calibration
        self._check, self._measured = check, measured
        self._split, self._config, self.memory = split, config, memory
        self._observer = observer
        self._is_dense = mx.default_device() == mx.Device(mx.cpu)
        if self._is_dense:
            make_dense(self._model)
        self._modules = dict(self._model.named_modules())
        batches = self._batches(calibration)
        self.tokens = sum(int(batch.counts[:, 1:].sum().item()) for batch in batches)

    def curvatures(self, names: Collection[str]) -> dict[str, Curvature]:
        """The curvature of the loss at some modules of the adapted model.

        Raises:
            RunError: the loss is not finite.
        """
        found = self._modules
        modules = {
            name: (found[name], linear_shape(getattr(found[name], "linear", found[name])))
            for name in names
        }
        loss, factors = self._observed("curvature", curvatures, modules)
        self.adapted = loss / self.tokens
        return factors

    def roundable(self, names: Collection[str]) -> tuple[list[str], list[str]]:
        """The linear layers in the model's blocks, and embeddings and output layers outside.

        Those of some names. Routers and experts are neither.
        """
        with adapters_off(self._model):
            inside = [name for name in target_linears(self._model) if name in names]
            blocks = {id(m) for block in self._model.layers for m in block.modules()}
            kinds = (*LINEAR_TYPES, nn.Embedding, nn.QuantizedEmbedding)
            outside = [
                name
                for name, module in self._model.named_modules()
                if name in names and isinstance(module, kinds) and id(module) not in blocks
            ]
        return inside, outside

    def merge(self, weights: Mapping[str, StoredWeight], written: Mapping[str, TensorFile]) -> None:
        """Measure the base model and the adapter, and put the written weights into the model.

        The adapter is taken off the model for good.

        Args:
            weights: the adapted weights by name.
            written: the file of each tensor that was written, by its name.
        """
        with self._observer.stage("measuring", 3) as advance:
            self._adapter = self._loss(self._measured)
            advance()
            self.goal = self.check_loss()
            advance()
            detach(self._model)
            self._modules = dict(self._model.named_modules())
            self._base = self._loss(self._measured)
            advance()
        for weight in weights.values():
            self.place(weight, weight.read(written))
        end_stage()

    def place(self, weight: StoredWeight, parts: Sequence[mx.array]) -> None:
        """Give the merged model a weight as it is stored, by its parts."""
        module = self._modules[weight.name]
        named = dict(zip(weight.parts, parts, strict=True))
        if "scales" in module:
            module.bits = weight.settings["bits"]
        else:
            dense = weight.dequantized(parts).astype(module.weight.dtype)
            named = {f"{weight.name}.weight": dense}
        shaped = [(name, part.reshape(*weight.shape[:-1], -1)) for name, part in named.items()]
        self._model.load_weights(shaped, strict=False)

    def calibration_loss(self) -> float:
        """The loss per counted token on the calibration samples, as the model is now."""
        return self._loss(self._calibration)

    def check_loss(self) -> float:
        """The same on the samples to check by."""
        return self._loss(self._check)

    def slopes(
        self, weights: Mapping[str, StoredWeight], files: Mapping[str, TensorFile]
    ) -> tuple[float, dict[str, list[mx.array]]]:
        """The merged model's loss per token on the calibration samples, and its gradients.

        They are those of the sum over ``tokens``, by scales and biases.

        Args:
            weights: whose, by name.
            files: the file of each of their tensors, by its name.

        Raises:
            RunError: the loss is not finite.
        """
        modules = {}
        for name, weight in weights.items():
            packed, scales, _ = weight.read(files)
            modules[name] = self._modules[name], weight.grid().levels(packed), scales.shape[1]
        loss, found = self._observed("adjusting", slopes, modules)
        return loss / self.tokens, found

    def losses(self) -> TaskLosses:
        """Measure the model as it is now; the others have been measured by ``merge``."""
        merged = self._loss(self._measured)
        end_stage()
        return TaskLosses(self._base, self._adapter, merged, len(self._measured), self._split)

    def _observed(self, stage: str, measure: Callable[..., T], modules: Mapping[str, Any]) -> T:
        """What ``measure`` finds at some modules on the calibration samples."""
        with self._observer.stage(stage, len(self._calibration)) as advance:
            try:
                found = measure(self._model, modules, self._batches(self._calibration), advance)
            except ValueError as error:
                raise RunError(f"rounding failed: {error}") from None
        end_stage()
        return found

    def _loss(self, samples: Sequence[Sample]) -> float:
        return mean_loss(self._model, self._batches(samples))

    def _batches(self, samples: Sequence[Sample]) -> list[Batch]:
        size, length = self._config.batch_size, self._config.max_seq_length
        return [batch for batch in batches_in_order(samples, size, length) if batch]


def read_task(
    adapter: Adapter, data: str | list[Any] | None = None, observer: Observer = SILENT
) -> AdaptedTask | None:
    """Load an adapted model and the data that it was trained on, to round by.

    Rows are read, drawn and cut as the run's own options say.

    Args:
        adapter: a run on a quantized model, or another tool's adapter.
        data: the task's data, instead of those that the run names.
        observer: notified of the splits' contents, and of the progress of the task's passes.

    Returns:
        What ``export_requantized`` takes; None if neither the run nor ``data`` names any data.

    Raises:
        UserError: the data or the model cannot be read, or the run's options are damaged.
    """
    stored = adapter.config if RUN.recognises(adapter.config) else {}
    options = {f.name: stored[f.name] for f in fields(TrainConfig) if f.name in stored}
    options |= {"model": adapter.model} | ({"data": data} if data else {})
    if not options.get("data"):
        return None
    config = from_keywords(TrainConfig, options)
    try:
        splits, _ = read_data(config, observer)
    except UserError as error:
        raise UserError(
            f"--quantize rounds by the task's data, which cannot be read: {error}; name data with "
            "--data, or pass --rounding nearest"
        ) from None
    number = config.calibration_samples
    drawn = draw_samples(splits["train"].samples, number + (number + 1) // 2, config.seed)
    calibration = [sample for i, sample in enumerate(drawn) if i % 3 < 2]
    check = drawn[2::3] or drawn  # of one or two samples there are no others
    split = "valid" if splits["valid"].samples else "train"
    measured = draw_samples(splits[split].samples, number, config.seed)
    base = load_adapter(adapter, trust_remote_code=config.trust_remote_code)
    if config.grad_checkpoint:
        enable_grad_checkpoint(base.model)
    names = {"valid": "validation", "train": "training"}
    memory = allowed_memory(config)
    return AdaptedTask(base, calibration, check, measured, names[split], config, memory, observer)


def make_dense(model: nn.Module) -> None:
    """Replace quantized layers by dense ones and half precision by float32.

    On a CPU, MLX takes 20 to 300 times as long for products with the others.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            continue
        rows, columns = linear_shape(module)
        if isinstance(module, nn.QuantizedEmbedding):
            dense = nn.Embedding(rows, columns)
        else:
            dense = nn.Linear(columns, rows, bias="bias" in module)
            if "bias" in module:
                dense.bias = module.bias
        dense.weight = dense_weight(module)
        replace_modules(model, {name: dense})
    model.set_dtype(mx.float32)
    model.freeze()
    mx.eval(model.parameters())
