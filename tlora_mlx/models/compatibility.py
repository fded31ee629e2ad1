"""Settings that mlx-lm's models read under a different name than transformers 5 writes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tlora_mlx.errors import RunError

# mlx-lm's name of each setting and the name that transformers 5 writes, the first table's inside
# rope_parameters.
OLDER_ROPE_NAMES = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}
OLDER_NAMES = {
    "n_ctx": "n_positions",
    "num_experts": "num_local_experts",
    "num_layers": "num_hidden_layers",
    "layer_norm_epsilon": "rms_norm_eps",
}
# Which are different settings there: olmo_hybrid's is that of a norm for which transformers, too,
# has a fixed value.
OTHER_SETTINGS = {"olmo_hybrid": {"layer_norm_epsilon"}}


def older_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Settings that transformers 5 moved or dropped, under the names that mlx-lm reads.

    Whether the output layer is tied is a setting of the whole multimodal model there, but mlx-lm
    looks for it in the language model's.

    Many of mlx-lm's models silently fall back to a default if they do not find RoPE's base
    (ml-explore/mlx-lm issue 1563), the share of each head that is rotated, or which layers attend
    to a window; others have no default and cannot be loaded.
    """
    others = OTHER_SETTINGS.get(config.get("model_type"), set())
    settings = {o: config.get(name) for o, name in OLDER_NAMES.items() if o not in others}
    period = _period(config.get("layer_types"))
    settings |= dict.fromkeys(("sliding_window_pattern", "full_attention_interval"), period)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
        local = rope.get("sliding_attention") or {}
        settings["rope_local_base_freq"] = local.get("rope_theta")
        rope = rope["full_attention"]
    scaling = None
    if isinstance(rope, dict):
        settings |= {older: rope.get(name) for older, name in OLDER_ROPE_NAMES.items()}
        scaling = rope if rope.get("rope_type", "default") != "default" else None
    text = config.get("text_config")
    if isinstance(text, dict):
        settings["vocab_size"] = text.get("vocab_size")
    settings = {k: v for k, v in settings.items() if v is not None and config.get(k) is None}
    if isinstance(rope, dict) and config.get("rope_scaling") is None:
        settings["rope_scaling"] = scaling
    if isinstance(text, dict):
        tied = config.get("tie_word_embeddings")
        inherited = {} if tied is None else {"tie_word_embeddings": tied}
        settings["text_config"] = inherited | text | older_settings(text)
    return settings


def _period(kinds: Any) -> int | None:
    """Every how many layers attention is full; None if there is no such pattern."""
    if not isinstance(kinds, list) or "full_attention" not in kinds:
        return None
    period = kinds.index("full_attention") + 1
    full = [(i + 1) % period == 0 for i in range(len(kinds))]
    return period if full == [kind == "full_attention" for kind in kinds] else None


def missed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a ``config.json`` without which plain mlx-lm computes a different model.

    They are under the names that mlx-lm reads; empty if it reads the configuration as it is, or
    does not know the family.
    """
    from mlx_lm.utils import _get_classes

    settings, missed = older_settings(config), {}
    text = config.get("text_config")
    if isinstance(text, dict) and (inner := missed_settings(text)):
        missed["text_config"] = {**text, **inner}
    settings.pop("text_config", None)
    try:
        _, arguments = _get_classes(config)
        read = vars(arguments.from_dict({**config, **settings}))
    except Exception:  # whatever an unknown family raises: nothing is known about it
        return missed
    try:
        plain = vars(arguments.from_dict(config))
    except TypeError:  # without some of them it is not read at all
        plain = {}
    same = [name for name in settings if name in plain and plain[name] == read.get(name)]
    return missed | {n: v for n, v in settings.items() if n in read and n not in same}


def mlx_lm_warning(name: str, config: dict[str, Any]) -> str | None:
    """A warning if plain mlx-lm computes a different model; None if it does not.

    Args:
        name: the model.
        config: its ``config.json``.
    """
    missed = missed_settings(config)
    missed |= {
        f"text_config.{key}": value
        for key, value in missed.pop("text_config", {}).items()
        if value != config["text_config"].get(key)
    }
    if not missed:
        return None
    lines = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in missed.items())
    return (
        f"warning: mlx_lm's own commands compute a different model from {name}, since they do not "
        f"read all that transformers 5 wrote into its config.json; for them, add {lines}"
    )


def shared_config(config: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """A ``config.json`` that mlx-lm and transformers read alike.

    It is found in a process of its own unless both are loaded already: they take memory and seconds
    that a merge does not need.

    Args:
        config: the contents of ``config.json``.
        path: the model's directory.

    Returns:
        The configuration with mlx-lm's settings, too; None if it needs none, or if transformers
        would then read it differently.

    Raises:
        RunError: that process failed.
    """
    if not _may_read(config.get("model_type"), older_settings(config)):
        return None
    if {"mlx_lm", "transformers"} <= sys.modules.keys():
        return _shared_config(config, path)
    # Its first path would be the working directory, where somebody else's json.py could be. Without
    # torch, configurations are read alike, and sooner.
    code = (
        "import sys; sys.path[:] = sys.argv[2:]; sys.modules['torch'] = None; "
        "import json; from pathlib import Path; "
        "from tlora_mlx.models.compatibility import _shared_config as shared; "
        "print(json.dumps(shared(json.load(sys.stdin), Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(path), *sys.path]
    done = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"cannot tell how mlx-lm reads {path / 'config.json'}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def _may_read(model_type: Any, names: Collection[str]) -> bool:
    """Whether mlx-lm's model of this type may read one of these settings.

    To import its code takes seconds; so it and the neighbours that it imports are searched for
    fields of these names. True where there is no such file: mlx-lm has another name for the type.
    """
    if not names:
        return False
    package = importlib.util.find_spec("mlx_lm").submodule_search_locations[0]
    sources = {path.stem: path for path in Path(package, "models").glob("*.py")}
    field = re.compile(rf"^ +({'|'.join(names)}) *:", re.MULTILINE)
    modules = [str(model_type)]
    for module in modules:  # it grows on the way
        code = sources[module].read_text() if module in sources else ""
        if not code or field.search(code):
            return True
        for imported in re.findall(r"^from \.(?:(\w+)| import ([\w, ]+))", code, re.MULTILINE):
            siblings = re.findall(r"\w+", " ".join(imported))
            modules += [name for name in siblings if name in sources and name not in modules]
    return False


def _shared_config(config: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """``shared_config`` in this process."""
    from transformers import AutoConfig

    missed = missed_settings(config)
    if not missed:
        return None
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps({**config, **missed}))
        try:
            before, after = (
                AutoConfig.from_pretrained(place).to_dict() for place in (path, directory)
            )
        except Exception:  # transformers does not know the family, or needs its code
            return None
    changed = [key for key, value in before.items() if after.get(key) != value]
    return None if set(changed) - {"_name_or_path", *missed} else {**config, **missed}
