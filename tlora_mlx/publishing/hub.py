"""Pushing an exported directory to the Hugging Face Hub, with the Hub's own client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora_mlx.errors import Interrupted, RunError, UserError, first_line
from tlora_mlx.invocation import suggested
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.publishing.contents import export_files
from tlora_mlx.publishing.hub_requests import OTHER_NAME, reason, retried, silent_client
from tlora_mlx.runs.run_directory import PLAN
from tlora_mlx.storage.files import read_json
from tlora_mlx.storage.foreign import file_in
from tlora_mlx.storage.hub_names import is_repository
from tlora_mlx.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

# The files that readers look for. With two exports in one repository they would be mixed up, such
# as the shards of an earlier merged model that had more of them.
READER_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")


def check_push(repository: str) -> str:
    """Check that a push is possible, before anything slow starts.

    Args:
        repository: ``USER/NAME`` or ``ORGANISATION/NAME``.

    Returns:
        The token.

    Raises:
        UserError: the name is malformed, there is no usable token, or the client is set to stay
            offline.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"repository {repository!r}: {first_line(error)}") from None
    if "/" not in repository:
        raise UserError(f"repository {repository!r} must be USER/NAME or ORGANISATION/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError("pushing needs the network, but HF_HUB_OFFLINE is set; unset it")
    try:
        token = get_token()
    except Exception as error:  # a keyless login or a token renewal may raise anything
        raise UserError(f"pushing needs a Hub token: {first_line(error)}") from None
    if not token:
        raise UserError("pushing needs a Hub token: log in with hf auth login, or set HF_TOKEN")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError("the Hub token has invalid characters; copy it again")
    return token


def check_base(base: str) -> None:
    """Refuse to push an adapter whose base model is a directory on this machine.

    Args:
        base: the base model that the adapter names.

    Raises:
        UserError: it is not a Hub repository.
    """
    if not is_repository(base):
        raise UserError(
            f"the base model {base} is a directory on this machine, which others do not have; "
            "export with its Hub repository as --base-model"
        )


def check_rights(repository: str, private: bool = False) -> None:
    """Ask the Hub whether the token may write to a repository, before anything slow starts.

    What a fine-grained token may do is known only when it tries.

    Args:
        repository: ``USER/NAME`` or ``ORGANISATION/NAME``; it need not exist.
        private: it is created as a private one, or is private already.

    Raises:
        UserError: as ``check_push``.
        RunError: the token is not valid or may not write there, the repository is public but
            should be private, or the Hub cannot be reached.
    """
    api = _client(check_push(repository))
    try:
        with silent_client():
            _check_account(retried(api.whoami), repository)
            retried(lambda: _find(api, repository, private))
    except Exception as error:  # the client's errors have no common base below Exception
        raise RunError(f"{reason(error, repository, api)}; nothing was exported") from None


def _check_account(account: Mapping[str, Any], repository: str) -> None:
    """Refuse a token that cannot write there, from the answer to ``whoami``."""
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    owners = [account["name"], *(found["name"] for found in account.get("orgs", ()))]
    if role == "read":
        raise RunError(f"the token may only read; {OTHER_NAME}")
    if role == "write" and repository.split("/")[0] not in owners:
        raise RunError(f"the token of {owners[0]} may not write to {repository}; {OTHER_NAME}")


def _client(token: str) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="tlora_mlx", library_version=__version__)


def push(
    directory: Path, repository: str, private: bool = False, observer: Observer = SILENT
) -> str:
    """Upload an exported directory as one commit; the repository is created if it is missing.

    Args:
        directory: the export; only what belongs to one is uploaded (``contents.export_files``).
        repository: ``USER/NAME`` or ``ORGANISATION/NAME``.
        private: create a private repository; an existing one must already be private.
        observer: notified of the files that are left out.

    Returns:
        The URL of the commit.

    Raises:
        UserError: as ``check_push``; or ``directory`` is not an export, or names a base model that
            is not on the Hub.
        RunError: the Hub refused, failed or could not be reached, or the repository holds another
            export. The message is one sentence with the server's reason, without the token;
            ``directory`` is unchanged.
        Interrupted: SIGINT arrived.
    """
    _check_export(directory)
    token = check_push(repository)
    files, others = export_files(directory)
    if others:
        observer.note(f"not part of the export, so not pushed: {', '.join(others)}")
    api = _client(token)
    command = suggested("upload", directory, repository, *["--private"] * private)
    again = f"{directory} is complete; push it again with: {command}"
    try:
        with silent_client():
            info = retried(lambda: _find_or_create(api, repository, private))
            _check_repository(info, directory)
            return retried(lambda: _commit(api, repository, directory, files))
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {again}", 130) from None
    except Exception as error:  # the client's errors have no common base below Exception
        raise RunError(f"{reason(error, repository, api)}; {again}") from None


def _check_export(directory: Path) -> None:
    """Refuse a directory that is not an export, or whose base model is not on the Hub."""
    if (directory / PLAN).exists() or not any(_is_reader_file(p.name) for p in directory.glob("*")):
        raise UserError(f"{directory} is not an export; make one with tlora export")
    path = file_in(directory, "adapter_config.json")
    config = read_json(path, "the adapter's configuration") if path.exists() else {}
    if not isinstance(config, dict):
        raise UserError(f"{path} is not an adapter's configuration")
    for key in ("base_model_name_or_path", "model"):  # PEFT's, mlx-lm's
        if base := config.get(key):
            check_base(str(base))


def _is_reader_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in READER_FILES)


def _find(api: HfApi, repository: str, private: bool) -> ModelInfo | None:
    """What the Hub knows about the repository; None if it is missing."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return None
    if private and not info.private:
        raise RunError(f"--private was given, but {repository} is public; choose another name")
    return info


def _find_or_create(api: HfApi, repository: str, private: bool) -> ModelInfo:
    """What the Hub knows about the repository, which is created if it is missing."""
    info = _find(api, repository, private)
    if info is None:
        api.create_repo(repository, private=private or None)
        info = _find(api, repository, private)
    return info


def _check_repository(info: ModelInfo, directory: Path) -> None:
    """Refuse a repository with files of another export, which readers would mix up."""
    names = [file.rfilename for file in info.siblings or ()]
    others = [
        name
        for name in names
        if "/" not in name and _is_reader_file(name) and not (directory / name).exists()
    ]
    if others:
        raise RunError(
            f"{info.id} has {', '.join(others)} from another export, which readers would mix up "
            "with this one; choose another name, or delete them there"
        )


def _commit(api: HfApi, repository: str, directory: Path, files: Sequence[Path]) -> str:
    """Upload the large files, then commit; what the Hub already has is not sent again."""
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(f.relative_to(directory).as_posix(), f) for f in files]
    for addition in additions:
        # One at a time: then the client uploads in this thread, where Ctrl-C ends it at once.
        api.preupload_lfs_files(repository, [addition], free_memory=False)
    message = f"Upload of tlora_mlx {__version__}"
    return api.create_commit(repository, additions, commit_message=message).commit_url
