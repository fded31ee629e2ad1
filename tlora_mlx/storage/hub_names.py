"""Which names are valid for a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path


def can_be_repository(name: str) -> bool:
    """Whether the Hub's client accepts ``name`` for a repository: NAME or OWNER/NAME."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_repository(name: str) -> bool:
    """Whether ``name`` can be a Hub repository, and does not exist as a path on this machine."""
    return can_be_repository(name) and not Path(name).exists()
