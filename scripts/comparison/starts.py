"""What each method starts from: its rank plan, and A of every adapted module."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from comparison.methods import Method
from tlora_mlx.config.training_options import TrainConfig
from tlora_mlx.method import linalg
from tlora_mlx.method.allocation import RankPlan, plan_ranks
from tlora_mlx.method.batch import Batch
from tlora_mlx.method.calibration import Calibration, calibrate
from tlora_mlx.method.covariance import accumulate, input_leaders
from tlora_mlx.method.layers import dense_weight, linear_shape
from tlora_mlx.method.subspace import task_subspace, top_right_vectors
from tlora_mlx.training.planning import calibration_batches
from tlora_mlx.training.setup import Setup


class Starts:
    """The starts on one base model and task; what a seed's samples say is measured once.

    Args:
        setup: base model, data and target modules. Plan and A are asked for while the model is the
            base alone.
        config: the options, of which the seed is replaced.
    """

    def __init__(self, setup: Setup, config: TrainConfig):
        self._setup, self._config = setup, config
        self._shapes = {name: linear_shape(module) for name, module in setup.targets.items()}
        self._leaders = input_leaders(setup.base.model, setup.targets)
        self._calibration = cache(self._calibrate)
        self._directions = cache(self._direction_covariances)
        self._gradients = cache(self._mean_gradients)
        self._moments = cache(self._gradient_moments)

    def plan(self, method: Method, seed: int) -> RankPlan:
        """The method's rank plan."""
        if not method.equal_parameters:
            return self._plan_of_rank(method, seed, method.rank or self._config.rank)
        wanted = self._config.rank * sum(out_features for out_features, _ in self._shapes.values())
        plans = [self._plan_of_rank(method, seed, rank) for rank in range(1, 4 * self._config.rank)]
        return min(plans, key=lambda plan: abs(trained_parameters(method, plan) - wanted))

    def _plan_of_rank(self, method: Method, seed: int, rank: int) -> RankPlan:
        sensitivities = dict.fromkeys(self._shapes, 1.0)
        if method.allocated:
            measured = self._calibration(seed)[0].sensitivities
            mean = statistics.mean(measured.values())
            sensitivities = {
                name: method.floor + (1 - method.floor) * s / mean for name, s in measured.items()
            }
        shares = {n: s / self._shapes[n][0] ** method.price for n, s in sensitivities.items()}
        plan = plan_ranks(shares, self._shapes, rank, float(rank))
        if method.scaled:
            return plan
        modules = {n: replace(m, scale=method.scale) for n, m in plan.modules.items()}
        return replace(plan, modules=modules)

    def matrices(self, method: Method, plan: RankPlan, seed: int) -> dict[str, mx.array]:
        """``NAME.lora_a`` (in, rank) of every adapted module."""
        tensors = {}
        for number, (name, module) in enumerate(plan.adapted().items()):
            shape = (module.in_features, module.rank)
            if method.a in ("lora", "random"):
                a = _drawn(method.a, shape, mx.random.key(1000 * seed + number))
            else:
                a = self._subspace(method.a, name, module.rank, seed).T
            if method.whitened or method.weighted:
                calibration, tokens = self._calibration(seed)
                covariance = calibration.covariances[self._leaders[name]]
                variance = (a * (covariance @ a)).sum(axis=0) / tokens
                if method.whitened:
                    a = a / mx.sqrt(variance + 1e-6 * variance.max())
                else:
                    a = a * variance**0.25 / mx.sqrt(mx.sqrt(variance).mean())
            tensors[f"{name}.lora_a"] = a
        return tensors

    def _subspace(self, kind: str, name: str, rank: int, seed: int) -> mx.array:
        """A (rank, in) of a module from its weight, inputs or gradient: orthonormal rows."""
        weight, leader = dense_weight(self._setup.targets[name]), self._leaders[name]
        match kind:
            case "task":
                return task_subspace(weight, self._calibration(seed)[0].covariances[leader], rank)
            case "directions":
                return task_subspace(weight, self._directions(seed)[leader], rank)
            case "covariance":
                covariance = self._calibration(seed)[0].covariances[leader]
                return task_subspace(mx.eye(covariance.shape[0]), covariance, rank)
            case "gradient":
                return top_right_vectors(self._gradients(seed)[name], rank)
            case "gradients":
                return top_right_vectors(self._moments(seed)[name], rank)
            case "weight":
                return top_right_vectors(weight, rank)
        raise ValueError(f"there is no A of kind {kind!r}")

    def _calibrate(self, seed: int) -> tuple[Calibration, float]:
        """Sensitivities and covariances, and the mean number of tokens of the samples."""
        model, targets, batches = self._setup.base.model, self._setup.targets, self._batches(seed)
        result = calibrate(model, targets, batches, set(self._leaders.values()))
        tokens = sum(batch.lengths.sum().item() for batch in batches)
        return result, tokens / result.samples

    def _direction_covariances(self, seed: int) -> dict[str, mx.array]:
        """The leaders' covariances, of the centred inputs scaled to unit length."""
        linears = {name: self._setup.targets[name] for name in set(self._leaders.values())}

        def gram(_: str, x: mx.array) -> mx.array:
            x = x * mx.rsqrt((x * x).sum(axis=1, keepdims=True) + 1e-12)
            return x.T @ x

        return accumulate(self._setup.base.model, linears, self._batches(seed), gram)

    def _mean_gradients(self, seed: int) -> dict[str, mx.array]:
        """Of the calibration samples' mean loss, by every target's W; up to a common factor."""
        return self._sum_of_gradients(self._batches(seed), lambda gradient: gradient)

    def _gradient_moments(self, seed: int) -> dict[str, mx.array]:
        """Sum of GᵀG (in, in), with G each calibration sample's gradient of every target's W."""
        return self._sum_of_gradients(self._batches(seed, batch_size=1), lambda g: g.T @ g)

    def _sum_of_gradients(
        self, batches: Iterable[Batch], what: Callable[[mx.array], mx.array]
    ) -> dict[str, mx.array]:
        """The sum over batches of something about every target's gradient."""
        model, sums = self._setup.base.model, {}
        for module in self._setup.targets.values():
            module.unfreeze(keys="weight")
        for batch in batches:
            _, gradients = nn.value_and_grad(model, _sum_of_mean_losses)(model, batch)
            found = tree_map(what, gradients)
            sums = tree_map(mx.add, sums, found) if sums else found
            mx.eval(sums)
        model.freeze()
        return {name.removesuffix(".weight"): g for name, g in tree_flatten(sums)}

    def _batches(self, seed: int, **options: Any) -> list[Batch]:
        """The calibration samples that the seed draws."""
        config = replace(self._config, seed=seed, **options)
        return calibration_batches(config, self._setup.data["train"])


def trained_parameters(method: Method, plan: RankPlan) -> int:
    """How many parameters the method trains: those of B, and of A where it is trained too."""
    return sum(
        m.rank * (m.out_features + (m.in_features if method.train_a else 0))
        for m in plan.modules.values()
    )


def _drawn(kind: str, shape: tuple[int, int], key: mx.array) -> mx.array:
    """A random A (in, rank): as mlx-lm draws LoRA's, or with orthonormal columns."""
    if kind == "lora":
        bound = 1 / math.sqrt(shape[0])
        return mx.random.uniform(-bound, bound, shape, key=key)
    return linalg.qr(mx.random.normal(shape, key=key))[0]


def _sum_of_mean_losses(model: nn.Module, batch: Batch) -> Any:
    targets, counts = batch.tokens[:, 1:], batch.counts[:, 1:]
    logits = model(batch.tokens[:, :-1])
    losses = mx.where(counts, nn.losses.cross_entropy(logits, targets), 0.0)
    return (losses.sum(axis=1) / counts.sum(axis=1)).sum()
