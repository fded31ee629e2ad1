"""The adapted layer, which layers are adapted, and how they are put into a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from tlora_mlx.method.allocation import RankPlan

LINEAR_TYPES = (nn.Linear, nn.QuantizedLinear)
# Components of the names of what chooses or weighs experts, in all of mlx-lm's models (0.32). An
# adapter there would change which experts a token goes to, so they are never targets.
ROUTERS = {"gate", "router", "modality_router", "shared_expert_gate"}


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, quantized or not."""
    out_features, in_features = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        in_features = in_features * 32 // linear.bits
    return out_features, in_features


def activation_dtype(linear: nn.Module) -> mx.Dtype:
    """The dtype of a linear layer's products: that of its weight, or of its quantization scales."""
    stored = linear.scales if isinstance(linear, nn.QuantizedLinear) else linear.weight
    # The fp modes (mxfp4, mxfp8, nvfp4) keep uint8 scales: bfloat16 is what such models run in.
    return stored.dtype if mx.issubdtype(stored.dtype, mx.floating) else mx.bfloat16


def dense_weight(linear: nn.Module, rows: slice = slice(None)) -> mx.array:
    """W (out, in) float32 of a linear layer, or some of its rows, dequantized; not evaluated."""
    if isinstance(linear, nn.QuantizedLinear):
        biases = linear.get("biases")
        return mx.dequantize(
            linear.weight[rows],
            linear.scales[rows],
            None if biases is None else biases[rows],
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
            global_scale=linear.get("global_scale"),
            dtype=mx.float32,
        )
    return linear.weight[rows].astype(mx.float32)


class TLoRALinear(nn.Module):
    """``y = linear(x) + scale · B (A x)`` with A frozen: only ``lora_b`` is a trained parameter.

    ``lora_a`` is kept in the dtype of the layer's products, so that what is saved is what was
    trained with; ``lora_b`` and with it the optimizer's state are float32, cast for the product.

    Args:
        linear: the frozen base layer, (out, in).
        lora_a: A transposed, (in, rank), as MLX keeps it.
        scale: the effective scaling of this module.
        lora_b: B transposed, (rank, out); zeros where it is not given, so that the layer's output
            is exactly the base layer's.
    """

    def __init__(
        self, linear: nn.Module, lora_a: mx.array, scale: float, lora_b: mx.array | None = None
    ):
        super().__init__()
        out_features, _ = linear_shape(linear)
        self.linear = linear
        self.scale = scale
        # Laid out as it will be when it is loaded again: products round by layout.
        self.lora_a = mx.contiguous(lora_a.astype(activation_dtype(linear)))
        if lora_b is None:
            lora_b = mx.zeros((lora_a.shape[1], out_features))
        self.lora_b = lora_b.astype(mx.float32)
        # New modules start unfrozen: without this A would be trained too.
        self.freeze()
        self.unfreeze(recurse=False, keys="lora_b")

    def __call__(self, x: mx.array) -> mx.array:
        """(…, in) -> (…, out), in the base layer's output dtype."""
        y = self.linear(x)
        b = (self.scale * self.lora_b).astype(self.lora_a.dtype)
        return y + ((x @ self.lora_a) @ b).astype(y.dtype)


def target_linears(
    model: nn.Module, num_layers: int = -1, suffixes: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The linear layers inside the transformer blocks, by full name, first block first.

    Embeddings and the output layer are outside of the blocks, so they are never among them; nor are
    the routers of a mixture of experts, whatever their class.

    Args:
        model: an mlx-lm model: ``model.layers`` are its blocks.
        num_layers: only the last so many blocks; -1 for all.
        suffixes: only modules with one of these last name components, such as ``q_proj``.

    Raises:
        ValueError: a suffix matches nothing (the message names those that exist), or there is no
            linear layer at all.
    """
    names = {id(module): name for name, module in model.named_modules()}
    blocks = model.layers[-num_layers:] if num_layers > 0 else model.layers
    found: dict[str, nn.Module] = {}
    for block in blocks:
        leaves = tree_flatten(block.leaf_modules(), is_leaf=nn.Module.is_module)
        for path, module in leaves:
            if isinstance(module, LINEAR_TYPES) and not ROUTERS & set(path.split(".")):
                found[f"{names[id(block)]}.{path}"] = module
    existing = sorted({name.rsplit(".", 1)[-1] for name in found})
    if not found:
        raise ValueError("the model has no linear layer inside its transformer blocks")
    unknown = sorted(set(suffixes or ()) - set(existing))
    if unknown:
        raise ValueError(
            f"the model has no target module named {', '.join(unknown)}; "
            f"its linear layers are {', '.join(existing)}"
        )
    return {k: v for k, v in found.items() if not suffixes or k.rsplit(".", 1)[-1] in suffixes}


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LINEAR_TYPES)}


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of a model, in its blocks or not, by full name."""
    return {name: linear_shape(module) for name, module in _linears(model).items()}


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put ``modules`` into ``model`` in place, by full name."""
    model.update_modules(tree_unflatten(list(modules.items())))


def attach(model: nn.Module, plan: RankPlan, tensors: Mapping[str, mx.array]) -> nn.Module:
    """Freeze the model and put a TLoRALinear wherever the plan gives a rank above 0, in place.

    Args:
        model: the base model.
        plan: ranks and scales by full module name.
        tensors: ``NAME.lora_a`` (in, rank) for every adapted module; ``NAME.lora_b`` (rank, out)
            where it is trained already, zeros otherwise.

    Returns:
        The model, whose only trainable parameters are the ``lora_b``.

    Raises:
        ValueError: the plan or the tensors do not fit the model; all faults in one message.
    """
    linears = _linears(model)
    faults = adapter_faults(plan, tensors, linear_shapes(model))
    if faults:
        raise ValueError("; ".join(faults))
    model.freeze()
    replace_modules(
        model,
        {
            name: TLoRALinear(
                linears[name],
                tensors[f"{name}.lora_a"],
                module.scale,
                tensors.get(f"{name}.lora_b"),
            )
            for name, module in plan.adapted().items()
        },
    )
    return model


def adapter_faults(
    plan: RankPlan, tensors: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """All that keeps ``tensors`` from being the adapter of ``plan`` on layers of these shapes.

    Args:
        plan: ranks and scales by full module name.
        tensors: ``NAME.lora_a`` (in, rank) and ``NAME.lora_b`` (rank, out), which may be absent.
        shapes: (out, in) of every linear layer that exists.
    """
    faults: list[str] = []
    expected: dict[str, tuple[int, int]] = {}
    for name, module in plan.adapted().items():
        if name not in shapes:
            faults.append(f"{name} is no linear layer of the model")
            continue
        out_features, in_features = shapes[name]
        expected[f"{name}.lora_a"] = (in_features, module.rank)
        expected[f"{name}.lora_b"] = (module.rank, out_features)
    for key, shape in expected.items():
        if key not in tensors:
            if key.endswith(".lora_a"):
                faults.append(f"{key} is missing")
        elif tuple(tensors[key].shape) != shape:
            faults.append(f"{key} has shape {tuple(tensors[key].shape)}, the plan asks for {shape}")
        elif not math.isfinite(mx.abs(tensors[key].astype(mx.float32)).max().item()):
            faults.append(f"{key} has entries that are not finite")
    if not faults:  # a missing module would make each of its tensors look unexpected too
        faults += [f"{key} is not in the plan" for key in sorted(set(tensors) - set(expected))]
    return faults


def adapter_tensors(model: nn.Module) -> dict[str, mx.array]:
    """``NAME.lora_a`` and ``NAME.lora_b`` of every TLoRALinear: the adapter, complete by itself."""
    return {
        f"{name}.{key}": module[key]
        for name, module in model.named_modules()
        if isinstance(module, TLoRALinear)
        for key in ("lora_a", "lora_b")
    }


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as its base alone, inside of the block."""
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, TLoRALinear)}
    replace_modules(model, {name: module.linear for name, module in adapted.items()})
    try:
        yield
    finally:
        replace_modules(model, adapted)


def trained_parameters(model: nn.Module) -> int:
    """How many parameters are trained: Σ rank·out over the adapted modules."""
    return sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
