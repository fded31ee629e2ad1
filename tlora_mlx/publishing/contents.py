"""Which files of a directory belong to an export."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from tlora_mlx.evaluation.survival import SURVIVAL
from tlora_mlx.models.model_directory import MODEL_FILES
from tlora_mlx.publishing.card import CARD, PICTURE
from tlora_mlx.storage.foreign import file_in

# In the directory itself; a merged model's further templates are the only files below it.
BELONGING = (*MODEL_FILES, "*.safetensors", "*.gguf", "Modelfile", CARD, PICTURE, SURVIVAL)
TEMPLATES = "additional_chat_templates/*.jinja"


def export_files(directory: Path) -> tuple[list[Path], list[str]]:
    """An export's own files, and the names of what else is in its directory, both sorted.

    Hidden files and directories never belong to it, such as the Hub client's ``.cache``.

    Raises:
        UserError: one of its own is a link to somewhere outside.
    """
    own = {
        path
        for path in (*directory.glob("*"), *directory.glob(TEMPLATES))
        if path.is_file()
        and not path.name.startswith(".")
        and (path.parent != directory or any(fnmatch(path.name, p) for p in BELONGING))
    }
    parents = {path.parent for path in own}
    others = [path.name for path in directory.glob("*") if path not in own | parents]
    return [file_in(directory, path.relative_to(directory)) for path in sorted(own)], sorted(others)
