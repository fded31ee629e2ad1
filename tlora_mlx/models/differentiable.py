"""What mlx-lm's models compute with while they are differentiated.

mlx-lm's Metal kernels have no gradient ("[Primitive::vjp] Not implemented for CustomKernel"). Most
models avoid them in training mode, by a loop over tokens whose gradient takes time and memory; some
use them all the same. On a CPU there are no kernels, so only a Mac could show the difference:
tests/helpers/metal.py stands in for one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.nn as nn

from tlora_mlx.models.attention import causal_attention
from tlora_mlx.models.fused import FUSED
from tlora_mlx.models.gated_delta import gated_delta_update, wkv7
from tlora_mlx.models.rg_lru import rg_lru
from tlora_mlx.models.selective_scan import jamba_step, mamba_sequence
from tlora_mlx.models.state_space import recurrent_gla, ssm_update

# By the name that a kernel, or the function that chooses one, has in mlx-lm's modules; methods by
# their class's name and their own; after a module's name and a colon if others have the name too.
_DIFFERENTIABLE = {
    "scaled_dot_product_attention": causal_attention,  # it has a gradient, which takes more memory
    "gated_delta_update": gated_delta_update,
    "ssm_update": ssm_update,
    "bailing_moe_linear:recurrent_gla": recurrent_gla,  # bailing_hybrid's is in chunks already
    "_sinkhorn_kernel": None,  # without it, deepseek_v41 does the same in plain operations
    **FUSED,
    "Rwkv7TimeMixing._wkv7": wkv7,
    "MambaBlock._process_sequence": mamba_sequence,
    "JambaMambaMixer.ssm_step": jamba_step,
    "RGLRU.__call__": rg_lru,
}


def replacements(module: ModuleType, path: str) -> Iterator[tuple[Any, str, Any, Any]]:
    """What is replaced in a module of mlx-lm: the module or class, the name, and both values."""
    for key, plain in _DIFFERENTIABLE.items():
        only_in, _, place = key.rpartition(":")
        *owner, name = place.split(".")
        holder = vars(module).get(owner[0]) if owner else module
        if holder is not None and name in vars(holder) and path.endswith(only_in):
            yield holder, name, vars(holder)[name], plain


@contextmanager
def differentiable_operations() -> Iterator[None]:
    """Inside the block, mlx-lm's models in training mode use operations that have a gradient."""
    found = [
        replacement
        for path, module in list(sys.modules.items())
        if path.startswith("mlx_lm.models.")
        for replacement in replacements(module, path)
    ]
    for holder, name, _, plain in found:
        setattr(holder, name, plain)
    try:
        yield
    finally:
        for holder, name, original, _ in found:
            setattr(holder, name, original)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside the block, gradients of the model can be computed, on a Mac's GPU too.

    It is in training mode, in which mlx-lm avoids most of its Metal kernels; dropout is off, since
    the statistics are those of the base model.
    """
    training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)):
            module.eval()
    try:
        with differentiable_operations():
            yield
    finally:
        model.train(training)
