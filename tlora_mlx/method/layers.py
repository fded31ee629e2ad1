"""The adapted layer, which layers are targets, and how adapters are attached to a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import EllipsisType

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from tlora_mlx.method.allocation import RankPlan
from tlora_mlx.method.experts import Expert, TLoRASwitchLinear, experts_of, is_switch

LINEAR_TYPES = (nn.Linear, nn.QuantizedLinear)
# A module that can be adapted: a linear layer, or one expert of a stacked one.
Linear = nn.Module | Expert
# Name components of the layers that choose or weigh experts, or choose the tokens to attend to, in
# all of mlx-lm's models (0.32). An adapter there would change what a token goes to, so they are
# never targets.
ROUTERS = {"gate", "router", "modality_router", "shared_expert_gate", "indexer"}


def linear_shape(linear: Linear) -> tuple[int, int]:
    """(out, in) of a linear layer or an expert, quantized or not."""
    layer = linear.switch if isinstance(linear, Expert) else linear
    out_features, in_features = layer.weight.shape[-2:]
    if "scales" in layer:
        in_features = in_features * 32 // layer.bits
    return out_features, in_features


def activation_dtype(linear: nn.Module) -> mx.Dtype:
    """The dtype of a layer's products: that of its weight, or of its quantization scales."""
    stored = linear.scales if "scales" in linear else linear.weight
    # The fp modes (mxfp4, mxfp8, nvfp4) have uint8 scales; such models run in bfloat16.
    return stored.dtype if mx.issubdtype(stored.dtype, mx.floating) else mx.bfloat16


def dense_weight(
    linear: Linear, rows: slice = slice(None), experts: slice | EllipsisType = ...
) -> mx.array:
    """W (out, in) float32 of a linear layer or an expert, or some of its rows, dequantized.

    It is not evaluated. Of a stacked layer it is (E, out, in), or that of some of its experts.
    """
    layer, which = linear if isinstance(linear, Expert) else (linear, experts)

    def some(array: mx.array | None) -> mx.array | None:
        return None if array is None else array[which][..., rows, :]

    if "scales" not in layer:
        return some(layer.weight).astype(mx.float32)
    scale = layer.get("global_scale")  # one for each expert, in nvfp4 alone
    weight = mx.dequantize(
        some(layer.weight),
        some(layer.scales),
        some(layer.get("biases")),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        global_scale=None if scale is None else mx.array(1.0),
        dtype=mx.float32,
    )
    return weight if scale is None else weight * scale[which][..., None, None]


class TLoRALinear(nn.Module):
    """``y = linear(x) + scale · B (A x)`` with A frozen: only ``lora_b`` is trained.

    ``lora_a`` has the dtype of the layer's products, so that the saved A is the one used in
    training; ``lora_b``, and so the optimizer's state, is float32 and cast for the product.

    Args:
        linear: the frozen base layer, (out, in).
        lora_a: A transposed, (in, rank), as MLX stores it.
        scale: this module's effective scale.
        lora_b: B transposed, (rank, out); zeros by default, so that the layer's output is exactly
            the base layer's.
    """

    def __init__(
        self, linear: nn.Module, lora_a: mx.array, scale: float, lora_b: mx.array | None = None
    ):
        super().__init__()
        out_features, _ = linear_shape(linear)
        self.linear = linear
        self.scale = scale
        # The memory layout that it will have when loaded again: rounding depends on the layout.
        self.lora_a = mx.contiguous(lora_a.astype(activation_dtype(linear)))
        if lora_b is None:
            lora_b = mx.zeros((lora_a.shape[1], out_features))
        self.lora_b = lora_b.astype(mx.float32)
        # New modules start unfrozen; without this, A would be trained too.
        self.freeze()
        self.unfreeze(recurse=False, keys="lora_b")

    def __call__(self, x: mx.array) -> mx.array:
        """(…, in) -> (…, out), in the base layer's output dtype."""
        y = self.linear(x)
        b = (self.scale * self.lora_b).astype(self.lora_a.dtype)
        return y + ((x @ self.lora_a) @ b).astype(y.dtype)

    def adapters(self) -> dict[str, mx.array]:
        """``lora_a`` (in, rank) and ``lora_b`` (rank, out)."""
        return {"lora_a": self.lora_a, "lora_b": self.lora_b}

    def restore_b(self, tensors: Mapping[str, mx.array]) -> None:
        """Restore ``lora_b`` from an earlier result of ``adapters``."""
        self.lora_b = tensors["lora_b"]


ADAPTED_TYPES = (TLoRALinear, TLoRASwitchLinear)


def target_linears(
    model: nn.Module,
    num_layers: int = -1,
    suffixes: Sequence[str] | None = None,
    experts: bool = False,
) -> dict[str, Linear]:
    """The linear layers inside the transformer blocks, by full name, first block first.

    Embeddings and the output layer are outside the blocks, so they are never included; neither are
    the routers of a mixture of experts, whatever their class.

    Args:
        model: an mlx-lm model: ``model.layers`` are its blocks.
        num_layers: only this many of the last blocks; -1 for all.
        suffixes: only modules with one of these last name components, such as ``q_proj``.
        experts: also each expert of a mixture, by its projection's name and its number.

    Returns:
        The model's own modules, quantized or not, and an ``Expert`` for each expert.

    Raises:
        ValueError: a suffix matches nothing (the message lists the existing ones), there is no
            linear layer, or experts are requested and there are none.
    """
    names = {id(module): name for name, module in model.named_modules()}
    blocks = model.layers[-num_layers:] if num_layers > 0 else model.layers
    found: dict[str, Linear] = {}
    for block in blocks:
        leaves = tree_flatten(block.leaf_modules(), is_leaf=nn.Module.is_module)
        for path, module in leaves:
            if isinstance(module, LINEAR_TYPES) and not ROUTERS & set(path.split(".")):
                found[f"{names[id(block)]}.{path}"] = module
            elif experts and is_switch(module):
                found |= experts_of(f"{names[id(block)]}.{path}", module)
    if experts and not any(isinstance(target, Expert) for target in found.values()):
        raise ValueError("the model has no experts")
    kinds = {name: re.search(r"([^.]+)(\.\d+)?$", name)[1] for name in found}
    existing = sorted(set(kinds.values()))
    if not found:
        raise ValueError("the model has no linear layer inside its transformer blocks")
    unknown = sorted(set(suffixes or ()) - set(existing))
    if unknown:
        raise ValueError(
            f"the model has no target module named {', '.join(unknown)}; "
            f"its linear layers are {', '.join(existing)}"
        )
    return {name: found[name] for name in found if not suffixes or kinds[name] in suffixes}


def _linears(model: nn.Module) -> dict[str, Linear]:
    """Every linear layer of a model and every expert of a stacked layer, by full name."""
    linears: dict[str, Linear] = {}
    for name, module in model.named_modules():
        if is_switch(module):
            linears |= experts_of(name, module)
        elif isinstance(module, LINEAR_TYPES):
            linears[name] = module
    return linears


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer and expert of a model, in its blocks or elsewhere."""
    return {name: linear_shape(module) for name, module in _linears(model).items()}


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace the modules of ``model`` with these names, in place."""
    model.update_modules(tree_unflatten(list(modules.items())))


def attach(model: nn.Module, plan: RankPlan, tensors: Mapping[str, mx.array]) -> nn.Module:
    """Freeze the model and replace each layer whose planned rank is above 0 by an adapted one.

    Args:
        model: the base model.
        plan: ranks and scales by full module name.
        tensors: ``NAME.lora_a`` (in, rank) for every adapted module; ``NAME.lora_b`` (rank, out)
            if it is already trained; without it, B is zero.

    Returns:
        The same model; its only trainable parameters are the ``lora_b``.

    Raises:
        ValueError: the plan or the tensors do not fit the model; all faults in one message.
    """
    linears = _linears(model)
    faults = adapter_faults(plan, tensors, linear_shapes(model))
    if faults:
        raise ValueError("; ".join(faults))
    model.freeze()
    adapted: dict[str, nn.Module] = {}
    switches: dict[str, dict[int, tuple[mx.array, float, mx.array | None]]] = {}
    for name, module in plan.adapted().items():
        linear, a, b = linears[name], tensors[f"{name}.lora_a"], tensors.get(f"{name}.lora_b")
        if isinstance(linear, Expert):
            switch = name.rsplit(".", 1)[0]
            switches.setdefault(switch, {})[linear.number] = (a, module.scale, b)
        else:
            adapted[name] = TLoRALinear(linear, a, module.scale, b)
    for name, adapters in switches.items():
        switch = linears[f"{name}.0"].switch
        adapted[name] = TLoRASwitchLinear(switch, activation_dtype(switch), adapters)
    replace_modules(model, adapted)
    return model


def adapter_faults(
    plan: RankPlan, tensors: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """All that prevents ``tensors`` from being ``plan``'s adapter on layers of these shapes.

    Args:
        plan: ranks and scales by full module name.
        tensors: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out), which may be absent.
        shapes: (out, in) of every linear layer that exists.
    """
    faults: list[str] = []
    expected: dict[str, tuple[int, int]] = {}
    for name, module in plan.adapted().items():
        if name not in shapes:
            faults.append(f"{name} is not a linear layer of the model")
            continue
        out_features, in_features = shapes[name]
        expected[f"{name}.lora_a"] = (in_features, module.rank)
        expected[f"{name}.lora_b"] = (module.rank, out_features)
    for key, shape in expected.items():
        tensor = tensors.get(key)
        if tensor is None:
            if key.endswith(".lora_a"):
                faults.append(f"{key} is missing")
        elif tuple(tensor.shape) != shape:
            faults.append(f"{key} has shape {tuple(tensor.shape)}, but the plan needs {shape}")
        elif not math.isfinite(mx.abs(tensor.astype(mx.float32)).max().item()):
            faults.append(f"{key} has entries that are not finite")
    if not faults:  # a missing module would make each of its tensors look unexpected too
        faults += [f"{key} is not in the plan" for key in sorted(set(tensors) - set(expected))]
    return faults


def adapter_tensors(model: nn.Module) -> dict[str, mx.array]:
    """``NAME.lora_a`` and ``NAME.lora_b`` of all adapted layers: the whole adapter."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, ADAPTED_TYPES)
        for key, tensor in module.adapters().items()
    }


def restore_b(model: nn.Module, tensors: Mapping[str, mx.array]) -> None:
    """Restore every B from an earlier ``adapter_tensors``; does nothing if ``tensors`` is empty."""
    for name, module in model.named_modules() if tensors else ():
        if isinstance(module, ADAPTED_TYPES):
            start = f"{name}."
            own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            module.restore_b(own)


def detach(model: nn.Module) -> dict[str, nn.Module]:
    """Make the model its base model again; returns what was attached, by full name."""
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, ADAPTED_TYPES)}
    replace_modules(model, {name: module.linear for name, module in adapted.items()})
    return adapted


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model is its base model without adapters."""
    adapted = detach(model)
    try:
        yield
    finally:
        replace_modules(model, adapted)


def trained_parameters(model: nn.Module) -> int:
    """The number of trained parameters: Σ rank·out over the adapted modules."""
    return sum(b.size for name, b in adapter_tensors(model).items() if name.endswith(".lora_b"))
