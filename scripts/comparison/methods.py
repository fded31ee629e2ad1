"""The methods that are compared, by name, and the learning rates that each may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

# What the others are compared with, seed by seed.
REFERENCE = "LoRA (equal parameters)"
# The rows of the model without an adapter.
BASE = "base"
RATES = [3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]


@dataclass(frozen=True)
class Method:
    """How A, ranks and scales come about.

    Attributes:
        a: ``task`` (W·C), ``directions`` (W·C, where each token counts by its direction alone, so
            that a few with massive activations do not decide), ``covariance`` (C alone, as EVA),
            ``weight`` (W alone), ``gradient`` (the mean gradient of W, as LoRA-GA), ``gradients``
            (each sample's gradient of W, so that those that cancel out count too), ``random``
            (orthonormal); ``lora``: LoRA's own, random and not orthonormal.
        allocated: ranks by sensitivity; else the same for all.
        scaled: scales by sensitivity; else ``scale``.
        scale: of all modules.
        train_a: A is trained too.
        price: a module's share of the ranks is divided by W's out to this power: at 1 it is a
            share of the trained parameters; below 0, wide outputs get more ranks.
        floor: this share of the ranks is the same for all, the rest is by sensitivity.
        whitened: A's rows are scaled so that each gives A x the same variance on the samples.
        weighted: A's rows are scaled, by the root of their standard deviation, the other way: what
            varies more moves faster.
        rank: the base rank, instead of the comparison's.
        equal_parameters: the rank is chosen instead, for as many trained parameters as B has
            at the base rank everywhere.
    """

    a: str = "task"
    allocated: bool = True
    scaled: bool = True
    scale: float = 1.0
    train_a: bool = False
    price: float = 0.0
    floor: float = 0.0
    whitened: bool = False
    weighted: bool = False
    rank: int | None = None
    equal_parameters: bool = False


def _and_at_equal_parameters(methods: Mapping[str, Method]) -> dict[str, Method]:
    """Each method, followed by its variant at the reference number of trained parameters.

    Uniform ranks with A frozen have that number already.
    """
    found = {}
    for name, method in methods.items():
        found[name] = method
        if (method.allocated and method.a != "random" and not method.floor) or method.train_a:
            found[f"{name} (equal parameters)"] = replace(method, equal_parameters=True)
    return found


_UNIFORM = Method(allocated=False, scaled=False)
METHODS = _and_at_equal_parameters(
    {
        "LoRA": Method("lora", allocated=False, scaled=False, train_a=True),
        "LoRA, mlx-lm's scale": Method(
            "lora", allocated=False, scaled=False, scale=20.0, train_a=True
        ),
        "random A, uniform": replace(_UNIFORM, a="random"),
        "TLoRA": Method(),
        "task A, uniform": _UNIFORM,
        "task A, uniform, rank 16": replace(_UNIFORM, rank=16),
        "TLoRA without scaling": Method(scaled=False),
        "task A, equal shares (equal parameters)": replace(
            _UNIFORM, price=1.0, equal_parameters=True
        ),
        "task A, ranks by outputs (equal parameters)": replace(
            _UNIFORM, price=-1.0, equal_parameters=True
        ),
        "task A, ranks by root of outputs (equal parameters)": replace(
            _UNIFORM, price=-0.5, equal_parameters=True
        ),
        "TLoRA without scaling, priced": Method(scaled=False, price=1.0),
        "directions A, uniform": replace(_UNIFORM, a="directions"),
        "gradient A, uniform": replace(_UNIFORM, a="gradient"),
        "gradients A, uniform": replace(_UNIFORM, a="gradients"),
        "covariance A, uniform": replace(_UNIFORM, a="covariance"),
        "TLoRA without scaling, floor": Method(scaled=False, floor=0.5),
        "task A trained, uniform": replace(_UNIFORM, train_a=True),
        "weight A, uniform": replace(_UNIFORM, a="weight"),
        "random A, allocated": Method("random"),
        "task A weighted, uniform": replace(_UNIFORM, weighted=True),
        "task A whitened, uniform": replace(_UNIFORM, whitened=True),
    }
)
