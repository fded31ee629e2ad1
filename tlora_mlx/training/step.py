"""One optimizer update: sum the gradients of some micro-batches, check them, apply them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.data.batches import collate
from tlora_mlx.data.samples import Sample
from tlora_mlx.distributed.collectives import rank, share, total_of_tree
from tlora_mlx.method.output_layer import summed_loss, target_rows
from tlora_mlx.models.differentiable import differentiable_operations


def make_optimizer(
    config: TrainConfig, model: nn.Module, state: Mapping[str, mx.array] | None = None
) -> optim.Optimizer:
    """The optimizer for the model's trainable parameters; the rate is set before each update.

    It has bias correction, as in the paper and in torch; MLX's default does not.

    Args:
        config: the run's options.
        model: with ``TLoRALinear`` layers attached.
        state: from a checkpoint, by flattened name.
    """
    if config.optimizer == "adamw":
        optimizer = optim.AdamW(0.0, weight_decay=config.weight_decay, bias_correction=True)
    else:
        optimizer = optim.Adam(0.0, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    if state:
        # In the order of init: mx.compile's fusion, and with it the rounding, depends on it.
        names = [name for name, _ in tree_flatten(optimizer.state)]
        optimizer.state = tree_unflatten([(name, state[name]) for name in names])
    return optimizer


class Step:
    """One optimizer update: sum the gradients of some micro-batches, check them, apply them."""

    def __init__(
        self, model: nn.Module, optimizer: optim.Optimizer, config: TrainConfig, separable: bool
    ):
        self.optimizer, self.config = optimizer, config
        self._trained = model.trainable_parameters
        self._state = [model.state, optimizer.state]
        mx.eval(self._state)
        loss_and_gradient = nn.value_and_grad(model, summed_loss)
        # A base model's dropout draws from MLX's random state.
        inputs = [model.state, mx.random.state]

        @partial(mx.compile, inputs=inputs, outputs=inputs)
        def gradient(tokens: mx.array, counts: mx.array, rows: int):
            with differentiable_operations():
                (loss, n), gradients = loss_and_gradient(model, tokens, counts, rows, separable)
            return loss, n, gradients

        @mx.compile
        def clip(gradients, n: mx.array):
            gradients = tree_map(lambda g: g / n, gradients)
            return optim.clip_grad_norm(gradients, config.max_grad_norm or math.inf)

        @partial(mx.compile, inputs=self._state, outputs=self._state)
        def update(gradients):
            optimizer.update(model, gradients)

        self._gradient, self._clip, self._update = gradient, clip, update

    def __call__(
        self, batches: list[list[Sample]], rate: float, number: int
    ) -> tuple[float, int, float]:
        """Update the model, unless the loss or the gradient is not finite.

        Args:
            batches: the micro-batches' samples; under ``mlx.launch`` all processes get the same
                ones, and each uses its share.
            rate: learning rate.
            number: the first micro-batch's number in the run; with the seed and the process's
                number, it determines the random state.

        Returns:
            The summed loss, the number of tokens that counted, and the mean gradient's norm.
        """
        mx.random.seed(((self.config.seed << 32) + (rank() << 56) + number) % 2**64)
        total = None
        for samples in filter(None, map(share, batches)):
            batch = collate(samples, self.config.max_seq_length)
            result = self._gradient(batch.tokens, batch.counts, target_rows(batch))
            # Sums, not means, so that a token weighs the same in every micro-batch.
            total = result if total is None else tree_map(mx.add, total, result)
            mx.eval(total)
        if total is None:  # more processes than samples
            total = mx.array(0.0), mx.array(0.0), tree_map(mx.zeros_like, self._trained())
        loss, n, gradients = total_of_tree(total)
        gradients, norm = self._clip(gradients, n)
        mx.eval(gradients, norm)
        if math.isfinite(loss.item()) and math.isfinite(norm.item()):
            self.optimizer.learning_rate = rate
            self._update(gradients)
            mx.eval(self._state)
        return loss.item(), int(n.item()), norm.item()
