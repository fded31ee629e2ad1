"""Experts of a mixture: each is a separate linear layer inside a stacked one.

mlx-lm stacks the experts of a block into one module per projection, which is called with the
experts that each token goes to. Here each expert is a module of the plan, named by the stacked
module and its number, such as ``model.layers.0.mlp.switch_mlp.up_proj.3``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tlora_mlx.method.batch import Batch


def is_switch(module: nn.Module) -> bool:
    """Whether it is one of mlx-lm's stacked layers, dense or quantized."""
    # mlx-lm imports transformers, which takes 2 seconds that exports without a model do not need.
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return isinstance(module, (SwitchLinear, QuantizedSwitchLinear))


class Expert(NamedTuple):
    """One expert of a stacked layer (``is_switch``), treated as a linear layer."""

    switch: nn.Module
    number: int


def experts_of(name: str, switch: nn.Module) -> dict[str, Expert]:
    """All experts of a stacked layer, by full name."""
    return {f"{name}.{e}": Expert(switch, e) for e in range(switch.num_experts)}


def stack_and_number(name: str) -> tuple[str, int | None]:
    """An expert's stacked layer and its number; for any other module, its own name and None.

    An expert's name is the stacked layer's name and a number.
    """
    stack, _, number = name.rpartition(".")
    return (stack, int(number)) if number.isdigit() else (name, None)


def modules_of(targets: Mapping[str, nn.Module | Expert]) -> dict[str, nn.Module]:
    """The model's modules that hold these targets: an expert's is its stacked layer."""
    return {
        name.rsplit(".", 1)[0] if isinstance(target, Expert) else name: (
            target.switch if isinstance(target, Expert) else target
        )
        for name, target in targets.items()
    }


def samples_of(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each sample as its own batch, without padding: a stacked layer mixes a batch's samples.

    Source: mlx_lm/models/switch_layers.py sorts the tokens of a batch by expert.
    """
    for batch in batches:
        for n, length in enumerate(batch.lengths.tolist()):
            one = slice(n, n + 1)
            yield Batch(batch.tokens[one, :length], batch.counts[one, :length], batch.lengths[one])


def routed_rows(array: mx.array, indices: mx.array) -> mx.array:
    """A stacked layer's input or output as (N, features), a row for each token and expert.

    Args:
        array: (…, 1, features), where … is ``indices``' shape, or has 1 as its last dimension.
        indices: (…) which expert each row goes to.
    """
    features = array.shape[-1]
    rows = mx.broadcast_to(array.squeeze(-2), (*indices.shape, features))
    return rows.reshape(-1, features)


def rows_by_expert(indices: mx.array, experts: int) -> list[mx.array | None]:
    """For each expert the rows (of ``routed_rows``) that go to it, or None. Evaluates."""
    flat = np.array(indices).reshape(-1)
    found = [np.nonzero(flat == e)[0] for e in range(experts)]
    return [mx.array(rows) if rows.size else None for rows in found]


class TLoRASwitchLinear(nn.Module):
    """A stacked layer whose experts each have their own adapter, ``scale · B (A x)``, A frozen.

    Experts' ranks differ, so A and B are padded with zeros to the largest. B's padding gets no
    gradient, since A's is zero.

    Args:
        linear: the frozen stacked layer of E experts, (E, out, in).
        dtype: the dtype of its products, and so of A.
        adapters: by the expert's number: A transposed (in, rank), scale, and B transposed
            (rank, out), or None for zeros.
    """

    def __init__(
        self,
        linear: nn.Module,
        dtype: mx.Dtype,
        adapters: Mapping[int, tuple[mx.array, float, mx.array | None]],
    ):
        super().__init__()
        experts, out_features = linear.num_experts, linear.output_dims
        self._ranks = {e: a.shape[1] for e, (a, _, _) in adapters.items()}
        rank, in_features = max(self._ranks.values()), linear.input_dims
        lora_a = mx.zeros((experts, in_features, rank))
        lora_b = mx.zeros((experts, rank, out_features))
        scales = mx.zeros((experts, 1, 1))
        for e, (a, scale, b) in adapters.items():
            lora_a[e, :, : a.shape[1]] = a.astype(mx.float32)
            scales[e] = scale
            if b is not None:
                lora_b[e, : b.shape[0]] = b.astype(mx.float32)
        self.linear = linear
        self.scales = scales
        self.lora_a = lora_a.astype(dtype)
        self.lora_b = lora_b
        self.freeze()
        self.unfreeze(recurse=False, keys="lora_b")

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Like the stacked layer: (…, 1, in) and the experts (…) -> (…, 1, out)."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        routing = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        b = (self.scales * self.lora_b).astype(self.lora_a.dtype)
        return y + mx.gather_mm(mx.gather_mm(x, self.lora_a, **routing), b, **routing).astype(
            y.dtype
        )

    def adapters(self) -> dict[str, mx.array]:
        """``E.lora_a`` (in, rank) and ``E.lora_b`` (rank, out) of each adapted expert."""
        tensors = {}
        for e, rank in self._ranks.items():
            tensors[f"{e}.lora_a"] = mx.contiguous(self.lora_a[e, :, :rank])
            tensors[f"{e}.lora_b"] = mx.contiguous(self.lora_b[e, :rank])
        return tensors

    def restore_b(self, tensors: Mapping[str, mx.array]) -> None:
        """Restore every ``E.lora_b`` from an earlier result of ``adapters``."""
        for e, rank in self._ranks.items():
            self.lora_b[e, :rank] = tensors[f"{e}.lora_b"]
