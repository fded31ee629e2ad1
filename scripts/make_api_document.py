"""Write docs/API.md from the docstrings of the public names.

python scripts/make_api_document.py
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import tlora_mlx

ROOT = Path(__file__).parents[1]
HEAD = """# Python

Made from the docstrings by `scripts/make_api_document.py`.
[examples/notebook.ipynb](../examples/notebook.ipynb) uses most of it.

```python
import tlora_mlx

result = tlora_mlx.train(model="mlx-community/Qwen3-4B-4bit", data="my-data", adapter_path="my-run")
```

The functions that are also commands take the command's options as keywords, by their names in YAML
([OPTIONS.md](OPTIONS.md)), or a configuration. With keywords they print their progress, unless
`quiet`; with a configuration they print nothing, unless an `observer` is given.
"""
# Titles, and the names below each; names that are in none come last.
SECTIONS = {
    "The commands": ("check", "plan", "train", "evaluate", "report", "export", "push"),
    "Their results": ("TrainingResult", "EvaluationResult", "ExportResult", "Proof"),
    "Adapters": (
        "load_adapter", "read_adapter", "resolve_adapter", "read_run", "combine", "export_peft",
        "export_mlx_lm", "export_merged", "export_dequantized", "export_requantized", "export_run",
        "read_task", "Adapter", "Combination",
        "AdaptedTask",
    ),
    "The method": (
        "load_base_model", "target_linears", "calibrate", "plan_ranks", "task_subspace", "attach",
        "BaseModel", "Calibration", "RankPlan", "ModulePlan", "TLoRALinear",
    ),
    "Configurations, progress and errors": (),
}  # fmt: skip


def document() -> str:
    """The whole page."""
    left = [name for name in tlora_mlx.__all__ if name != "__version__"]
    parts = [HEAD]
    named = {name for names in SECTIONS.values() for name in names}
    for title, names in SECTIONS.items():
        chosen = names or [name for name in left if name not in named]
        parts.append(f"## {title}\n")
        parts += [entry(name) for name in chosen]
    return "\n".join(parts)


def entry(name: str) -> str:
    """One name: its signature or methods, and its docstring."""
    thing = getattr(tlora_mlx, name)
    text = inspect.getdoc(thing) or ""
    lines = [f"### {name}\n"]
    if inspect.isfunction(thing):
        options = {item.name for item in fields(thing.options)} if hasattr(thing, "options") else {}
        own = [line for line in text.splitlines() if line[4:].partition(":")[0] not in options]
        head = f"{name}{_arguments(thing, set(options))}"
        lines.append("\n".join(["```text", head, "", *own, "```", ""]))
        return "\n".join(lines)
    methods = [
        f"{method}(): {(inspect.getdoc(value) or '').splitlines()[0]}"
        for method, value in vars(thing).items()
        if inspect.isfunction(value) and not method.startswith("_") and value.__doc__
    ]
    shown = "\n".join(
        [text, *(["", "Methods:", *(f"    {m}" for m in methods)] if methods else [])]
    )
    lines.append(f"```text\n{shown}\n```\n")
    return "\n".join(lines)


def _arguments(function: object, options: set[str]) -> str:
    """The arguments' names; those of a command's options as **options."""
    names = [
        name if parameter.default is parameter.empty else f"{name}={_shown(parameter.default)}"
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in options
    ]
    return f"({', '.join([*names, *(['**options'] if options else [])])})"


def _shown(default: object) -> str:
    """A default value; of an object, which has none in words, only that there is one."""
    plain = default is None or isinstance(default, (bool, int, float, str))
    return repr(default) if plain else "…"


if __name__ == "__main__":
    (ROOT / "docs/API.md").write_text(document(), encoding="utf-8")
