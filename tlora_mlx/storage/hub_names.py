"""Names of repositories on the Hugging Face Hub, and why one of them was not provided."""

from __future__ import annotations

from pathlib import Path

from tlora_mlx.errors import first_line


def can_be_repository(name: str) -> bool:
    """Whether the Hub's client accepts ``name`` for a repository: NAME or OWNER/NAME."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def why_not_provided(error: BaseException) -> str:
    """Why the Hub's client could not download something: the end of a sentence, with advice."""
    causes, cause = [], error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    responses = (getattr(cause, "response", None) for cause in causes)
    status = next((r.status_code for r in responses if r is not None), None)
    if "GatedRepoError" in kinds:
        return "it is gated: accept its licence on its page, then log in with hf auth login"
    if status == 404:
        return (
            "it has no repository of that name (404); if it is private, log in with hf auth login"
        )
    if status in (401, 403):
        return f"it refused access ({status}); log in with hf auth login"
    if status is not None and status >= 500:
        return f"it failed ({status}); try later"
    if "OfflineModeIsEnabled" in kinds:
        return "the client is set to stay offline (HF_HUB_OFFLINE)"
    if kinds & {"ConnectError", "ConnectTimeout", "LocalEntryNotFoundError"}:
        return "it could not be reached; check the network"
    return first_line(error)


def is_repository(name: str) -> bool:
    """Whether ``name`` can be a Hub repository, and does not exist as a path on this machine."""
    return can_be_repository(name) and not Path(name).exists()
