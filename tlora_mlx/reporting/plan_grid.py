"""How every view lays out a rank plan: blocks × module kinds."""

from __future__ import annotations

from dataclasses import replace

from tlora_mlx.method.allocation import ModulePlan, RankPlan


def plan_grid(plan: RankPlan) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    """The blocks, the module kinds, and the module's full name at each (block, kind).

    ``model.layers.3.self_attn.q_proj`` is block ``3``, kind ``q_proj``.
    """
    cells = {}
    for name in plan.modules:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        kind = parts[-1]
        if (parts[number], kind) in cells:  # two modules of one kind in a block
            kind = ".".join(parts[number + 1 :])
        cells[parts[number], kind] = name
    return (
        list(dict.fromkeys(block for block, _ in cells)),
        list(dict.fromkeys(kind for _, kind in cells)),
        cells,
    )


def experts_summed(plan: RankPlan) -> RankPlan:
    """The plan with each stacked layer's experts combined into one module, for display.

    Its rank is the sum of their ranks, its scale the mean over the adapted experts.
    """
    modules: dict[str, ModulePlan] = {}
    stacks: dict[str, list[ModulePlan]] = {}
    for name, module in plan.modules.items():
        stack, _, number = name.rpartition(".")
        if not number.isdigit():
            modules[name] = module
            continue
        experts = stacks.setdefault(stack, [])
        experts.append(module)
        scales = [expert.scale for expert in experts if expert.rank]
        modules[stack] = replace(
            module,
            rank=sum(expert.rank for expert in experts),
            scale=sum(scales) / max(1, len(scales)),
            sensitivity=sum(expert.sensitivity for expert in experts),
        )
    return replace(plan, modules=modules)


def plan_cell(plan: RankPlan, name: str | None) -> str:
    """A cell of the table: "12×1.5", a dash for rank 0, empty if there is no module."""
    if name is None:
        return ""
    module = plan.modules[name]
    return f"{module.rank}×{module.scale:.3g}" if module.rank else "–"
