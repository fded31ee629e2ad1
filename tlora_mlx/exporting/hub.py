"""Pushing an exported directory to the Hugging Face Hub, with its own client."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, TypeVar

from tlora_mlx.errors import Interrupted, RunError, UserError, first_line
from tlora_mlx.exporting.card import is_repository
from tlora_mlx.files import read_json
from tlora_mlx.run_directory import PLAN
from tlora_mlx.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

T = TypeVar("T")

# Seconds before what failed is tried again: the client by itself does so for some requests only.
WAITS = (1, 2, 4)
# What readers look for: one export's beside another's would be mixed up, such as the shards of a
# merged model that had more of them.
READ = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
# By HTTP status: what it means here, and what to do.
OTHER_NAME = "choose a name of your own, or a token with write access"
TOLD = {
    401: ("the Hub does not accept the token", "log in again with: hf auth login"),
    403: ("the token may not write to {}", OTHER_NAME),
    404: ("the token does not reach {}", OTHER_NAME),
    409: ("{} is taken, or another is changing it", "choose another name, or try later"),
    429: ("the Hub has had too many requests from this account", "try later"),
}
FAILED, REFUSED = ("the Hub failed", "try later"), ("the Hub refused the push", None)


def check_push(repository: str) -> str:
    """See that a push can be tried at all, before anything takes long; returns the token.

    Raises:
        UserError: the name is malformed, there is no token, or the client is told to stay offline.
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
        raise UserError("pushing needs the network, and HF_HUB_OFFLINE is set; unset it")
    try:
        token = get_token()
    except Exception as error:  # whatever a keyless login or a token's renewal fails with
        raise UserError(f"pushing needs a token of the Hub: {first_line(error)}") from None
    if not token:
        raise UserError(
            "pushing needs a token of the Hub: log in with hf auth login, or set HF_TOKEN"
        )
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError("the token of the Hub holds characters that no token has; copy it again")
    return token


def check_base(base: str) -> None:
    """Refuse to push an adapter that names its base model by a directory of this machine.

    Raises:
        UserError: it does.
    """
    if not is_repository(base):
        raise UserError(
            f"the base model {base} is a directory of this machine, which others do not have; "
            "export with its Hub repository as --base-model"
        )


def push(directory: Path, repository: str, private: bool = False) -> str:
    """Upload an exported directory as one commit; the repository is made where it is missing.

    Args:
        directory: what was exported; all of its files go.
        repository: ``USER/NAME``.
        private: make the repository private; one that exists must be private already.

    Returns:
        The commit's address.

    Raises:
        UserError: as ``check_push``; ``directory`` is no export, or its base model is not the
            Hub's.
        RunError: the Hub refused, failed or was not reached; what it said is told in one sentence,
            without the token. ``directory`` is as it was.
        Interrupted: SIGINT came.
    """
    token = check_push(repository)
    _check_export(directory)
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="tlora_mlx", library_version=__version__)
    command = f"python -m tlora_mlx.upload {quote(str(directory))} {repository}"
    again = f"{directory} is whole, push it again with: {command}{' --private' * private}"
    try:
        with _quiet():
            _check_repository(_retried(lambda: _repository(api, repository, private)), directory)
            return _retried(lambda: _commit(api, repository, directory))
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {again}", 130) from None
    except Exception as error:  # the client's errors have no common base below Exception
        raise RunError(f"{_told(error, repository, api)}; {again}") from None


def _check_export(directory: Path) -> None:
    if (directory / PLAN).exists() or not any(_is_read(p.name) for p in directory.glob("*")):
        raise UserError(f"{directory} is no export; make one with tlora export")
    path = directory / "adapter_config.json"
    config = read_json(path, "the adapter's configuration") if path.exists() else {}
    for key in ("base_model_name_or_path", "model"):  # PEFT's, mlx-lm's
        if base := config.get(key):
            check_base(base)


def _is_read(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in READ)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the client passes on of the server's words from the terminal.

    They may repeat the token, or hold the signed addresses of uploads. Its bars go to terminals
    alone.
    """
    from huggingface_hub import utils

    before, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    if bars and not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        utils.logging.set_verbosity(before)
        if bars:
            utils.enable_progress_bars()


def _repository(api: HfApi, repository: str, private: bool) -> ModelInfo:
    """What the Hub has of the repository, which is made if it is missing."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private or None)
        info = api.model_info(repository)
    if private and not info.private:
        raise RunError(f"--private, but {repository} exists and is public; choose another name")
    return info


def _check_repository(info: ModelInfo, directory: Path) -> None:
    """Refuse to put an export beside another, whose files readers would take for this one's."""
    names = [file.rfilename for file in info.siblings or ()]
    others = [
        name
        for name in names
        if "/" not in name and _is_read(name) and not (directory / name).exists()
    ]
    if others:
        raise RunError(
            f"{info.id} holds {', '.join(others)} of another export, which readers would mix up "
            "with this one; choose another name, or delete them there"
        )


def _commit(api: HfApi, repository: str, directory: Path) -> str:
    """Upload what is large, then make the commit; what the Hub has already is not sent again."""
    from huggingface_hub import CommitOperationAdd

    files = sorted(path for path in directory.rglob("*") if path.is_file())
    additions = [CommitOperationAdd(f.relative_to(directory).as_posix(), f) for f in files]
    for addition in additions:
        # One by one: the client does that in this thread, where Ctrl-C ends it at once.
        api.preupload_lfs_files(repository, [addition], free_memory=False)
    message = f"Upload of tlora_mlx {__version__}"
    return api.create_commit(repository, additions, commit_message=message).commit_url


def _retried(call: Callable[[], T]) -> T:
    """Call again, after a while, where the Hub failed or was not reached."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            status = _status(error)
            if not (status >= 500 if status else _is_connection(error)):
                raise
        time.sleep(wait)
    return call()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error, or what caused it, came with."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((response.status_code for response in responses if response is not None), None)


def _is_connection(error: BaseException) -> bool:
    from huggingface_hub.errors import HTTPError  # that of httpx, or of httpx2 from 2.0 on

    kinds = (HTTPError, ConnectionError, TimeoutError)
    return any(isinstance(cause, kinds) for cause in _causes(error))


def _told(error: Exception, repository: str, api: HfApi) -> str:
    """What went wrong, with the server's own words, and what to do; on one line."""
    if isinstance(error, RunError):
        return str(error)
    causes = list(_causes(error))
    status = _status(error)
    if status is None:
        what = "the push failed"
        if _is_connection(error):
            what = f"the Hub at {api.endpoint} was not reached, or the connection broke"
        return f"{what}: {_words(str(causes[-1]), api.token) or type(causes[-1]).__name__}"
    what, advice = TOLD.get(status, FAILED if status >= 500 else REFUSED)
    said = (getattr(cause, "server_message", None) for cause in causes)
    said = _words(next((text for text in said if text), ""), api.token)
    told = f"{what.format(repository)} ({status}{': ' if said else ''}{said})"
    return f"{told}; {advice}" if advice else told


def _words(text: str, token: str) -> str:
    """Another's words without the token and what terminals obey, on one line that has an end."""
    text = text.replace(token, "<token>")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 300 else f"{text[:300]} …"
