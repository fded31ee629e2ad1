"""The task that a merged model has to keep: the adapted model, and samples of the user's data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

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
from tlora_mlx.merging.conversion import StoredWeight
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.curvature import Curvature, curvatures
from tlora_mlx.method.layers import (
    adapters_off,
    dense_weight,
    detach,
    linear_shape,
    replace_modules,
)
from tlora_mlx.models.base_model import BaseModel
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.storage.safetensors import TensorFile
from tlora_mlx.training.memory import end_stage
from tlora_mlx.training.planning import allowed_memory
from tlora_mlx.training.setup import enable_grad_checkpoint, read_data
from tlora_mlx.training.validation import mean_loss


@dataclass(frozen=True)
class TaskLosses:
    """What is left of an adapter's effect, in nats per counted token of the same samples.

    Attributes:
        base: the loss without the adapter.
        adapter: with it, in full precision.
        merged: of what was written.
        samples: how many samples were measured.
        split: of which split they are.
    """

    base: float
    adapter: float
    merged: float
    samples: int
    split: str

    @property
    def kept(self) -> float | None:
        """The share of the improvement that is left; None if the adapter improves nothing."""
        gained = self.base - self.adapter
        return (self.base - self.merged) / gained if gained > 0 else None

    def summary(self) -> str:
        """For the user, without a full stop."""
        losses = (
            f"loss {self.base:.4f} without the adapter, {self.adapter:.4f} with it, "
            f"{self.merged:.4f} merged, on {self.samples} {self.split} samples"
        )
        if self.kept is None:
            return f"the adapter does not improve the {losses}"
        return f"{self.kept:.1%} of the adapter's improvement is left ({losses})"


class AdaptedTask:
    """An adapter on its quantized model, and the samples that say what matters.

    Attributes:
        memory: bytes that the modules' curvatures may take.

    Args:
        base: the model with the adapter attached.
        calibration: the samples to take curvatures from.
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
        measured: Sequence[Sample],
        split: str,
        config: PlanConfig,
        memory: int,
        observer: Observer = SILENT,
    ):
        self._model, self._calibration, self._measured = base.model, calibration, measured
        self._split, self._config, self.memory = split, config, memory
        self._observer = observer
        self._is_dense = mx.default_device() == mx.Device(mx.cpu)
        if self._is_dense:
            make_dense(self._model)

    def curvatures(self, names: Collection[str]) -> dict[str, Curvature]:
        """The curvature of the loss at some modules of the adapted model.

        Raises:
            RunError: the loss is not finite.
        """
        found = dict(self._model.named_modules())
        modules = {
            name: (found[name], linear_shape(getattr(found[name], "linear", found[name])))
            for name in names
        }
        with self._observer.stage("curvature", len(self._calibration)) as advance:
            try:
                curved = curvatures(self._model, modules, self._batches(self._calibration), advance)
            except ValueError as error:
                raise RunError(f"rounding failed: {error}") from None
        end_stage()
        return curved

    def losses(
        self, weights: Mapping[str, StoredWeight], written: Mapping[str, TensorFile]
    ) -> TaskLosses:
        """Measure the base model, the adapter, and the model with the written weights.

        The adapter is taken off the model for good.

        Args:
            weights: the adapted weights by name.
            written: the file of each tensor that was written, by its name.
        """
        with self._observer.stage("measuring", 3) as advance:
            adapter = self._loss()
            advance()
            with adapters_off(self._model):
                base = self._loss()
            advance()
            detach(self._model)
            modules = dict(self._model.named_modules())
            for name, weight in weights.items():
                if "scales" in modules[name]:
                    parts = [(part, written[part][part]) for part in weight.parts]
                else:
                    dense = weight.dense(written, 0, weight.rows).reshape(weight.shape)
                    parts = [(f"{name}.weight", mx.array(dense))]
                self._model.load_weights(parts, strict=False)
            merged = self._loss()
            advance()
        end_stage()
        return TaskLosses(base, adapter, merged, len(self._measured), self._split)

    def _loss(self) -> float:
        return mean_loss(self._model, self._batches(self._measured))

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
    calibration = draw_samples(splits["train"].samples, config.calibration_samples, config.seed)
    split = "valid" if splits["valid"].samples else "train"
    measured = draw_samples(splits[split].samples, config.calibration_samples, config.seed)
    base = load_adapter(adapter, trust_remote_code=config.trust_remote_code)
    if config.grad_checkpoint:
        enable_grad_checkpoint(base.model)
    names = {"valid": "validation", "train": "training"}
    return AdaptedTask(
        base, calibration, measured, names[split], config, allowed_memory(config), observer
    )


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
