"""The loss on a split: during training, and on the test split before and after."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.data.batches import batches_in_order
from tlora_mlx.data.samples import Split
from tlora_mlx.distributed.collectives import processes, total
from tlora_mlx.errors import Interrupted
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.output_layer import is_separable, summed_loss, target_rows
from tlora_mlx.observer import SILENT, Advance, Observer, no_advance
from tlora_mlx.training.memory import end_stage
from tlora_mlx.training.signals import agreed


def mean_loss(
    model: nn.Module, batches: Iterable[Batch | None], advance: Advance = no_advance
) -> float:
    """The mean loss per counted token, over all batches.

    Under ``mlx.launch`` each process passes its part of each batch (None if it has none), and all
    get the mean over all.
    """
    model.eval()
    sums, separable = [0.0, 0.0], None
    for batch in batches:
        if batch:
            if separable is None:
                separable = is_separable(model, batch.tokens[:1])
            loss, n = summed_loss(model, batch.tokens, batch.counts, target_rows(batch), separable)
            sums[0] += loss.item()
            sums[1] += n.item()
        advance()
    if processes() > 1:
        sums = total(mx.array(sums)).tolist()
    return sums[0] / sums[1]


def evaluate(
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    name: str,
    limit: int,
    stops: list[int] | None = None,
    observer: Observer = SILENT,
) -> float:
    """``mean_loss`` over a split, or over ``limit`` evenly spread batches of it, as a stage.

    Raises:
        Interrupted: a signal arrived in ``stops``, in any process.
    """
    samples = split.samples
    if 0 < limit * config.batch_size < len(samples):
        step = len(samples) / (limit * config.batch_size)
        samples = [samples[int(i * step)] for i in range(limit * config.batch_size)]
    with observer.stage(name, -(-len(samples) // config.batch_size)) as advance:

        def advance_or_stop() -> None:
            advance()
            if stops is not None and (stop := agreed(stops)):
                raise Interrupted("", 128 + stop)

        batches = batches_in_order(samples, config.batch_size, config.max_seq_length)
        loss = mean_loss(model, batches, advance_or_stop)
    end_stage()
    return loss
