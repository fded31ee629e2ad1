"""Pushing an exported directory to the Hugging Face Hub, with the Hub's own client."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_chain, wait_fixed

from tlora_mlx.errors import Interrupted, RunError, UserError, first_line
from tlora_mlx.invocation import suggested
from tlora_mlx.observer import SILENT, Observer
from tlora_mlx.publishing.contents import export_files
from tlora_mlx.runs.run_directory import PLAN
from tlora_mlx.storage.files import read_json
from tlora_mlx.storage.foreign import file_in
from tlora_mlx.storage.hub_names import is_repository
from tlora_mlx.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

T = TypeVar("T")

# Seconds before each new attempt: the client itself retries only some requests.
WAITS = (1, 2, 4)
# The files that readers look for. With two exports in one repository they would be mixed up, such
# as the shards of an earlier merged model that had more of them.
READER_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
# By HTTP status: what it means here, and what to do.
OTHER_NAME = "choose a name of your own, or a token with write access"
HTTP_ADVICE = {
    401: ("the Hub does not accept the token", "log in again with: hf auth login"),
    403: ("the token may not write to {}", OTHER_NAME),
    404: ("the token does not reach {}", OTHER_NAME),
    409: ("{} exists, or is being changed", "choose another name, or try later"),
    429: ("the Hub received too many requests from this account", "try later"),
}
SERVER_ERROR = ("the Hub failed", "try later")
OTHER_ERROR = ("the Hub refused the push", None)
# The longest text from the server that a message repeats.
MAX_QUOTED = 300


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
    token = check_push(repository)
    _check_export(directory)
    files, others = export_files(directory)
    if others:
        observer.note(f"not part of the export, so not pushed: {', '.join(others)}")
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="tlora_mlx", library_version=__version__)
    command = suggested("upload", directory, repository, *["--private"] * private)
    again = f"{directory} is complete; push it again with: {command}"
    try:
        with _silent_client():
            info = _retried(lambda: _find_or_create(api, repository, private))
            _check_repository(info, directory)
            return _retried(lambda: _commit(api, repository, directory, files))
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {again}", 130) from None
    except Exception as error:  # the client's errors have no common base below Exception
        raise RunError(f"{_reason(error, repository, api)}; {again}") from None


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


@contextmanager
def _silent_client() -> Iterator[None]:
    """Hide the client's log and warnings, and show its progress bars only on a terminal.

    They repeat what the server says, which may contain the token or signed upload URLs.
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


def _find_or_create(api: HfApi, repository: str, private: bool) -> ModelInfo:
    """What the Hub knows about the repository, which is created if it is missing."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private or None)
        info = api.model_info(repository)
    if private and not info.private:
        raise RunError(f"--private was given, but {repository} is public; choose another name")
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


def _retried(call: Callable[[], T]) -> T:
    """Call, and retry after each of ``WAITS`` while the error may be temporary."""
    return Retrying(
        retry=retry_if_exception(_is_temporary),
        wait=wait_chain(*map(wait_fixed, (*WAITS, 0))),  # 0 is never slept: a chain is never empty
        stop=stop_after_attempt(len(WAITS) + 1),
        sleep=lambda seconds: time.sleep(seconds),  # looked up late, for tests to replace
        reraise=True,
    )(call)


def _is_temporary(error: BaseException) -> bool:
    """Whether the Hub failed or could not be reached, rather than refused."""
    if not isinstance(error, Exception):  # Ctrl-C
        return False
    status = _status(error)
    return status >= 500 if status else _is_connection(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, and so on to the first cause."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error or of its causes; None if no answer came."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((response.status_code for response in responses if response is not None), None)


def _is_connection(error: BaseException) -> bool:
    """Whether the Hub could not be reached, or the connection broke."""
    from huggingface_hub.errors import HTTPError  # from httpx, or from httpx2 since version 2.0

    kinds = (HTTPError, ConnectionError, TimeoutError)
    return any(isinstance(cause, kinds) for cause in _causes(error))


def _reason(error: Exception, repository: str, api: HfApi) -> str:
    """What went wrong, in the server's own words, and what to do; one line."""
    if isinstance(error, RunError):
        return str(error)
    causes = list(_causes(error))
    status = _status(error)
    if status is None:
        what = "the push failed"
        if _is_connection(error):
            what = f"the Hub at {api.endpoint} could not be reached, or the connection broke"
        return f"{what}: {_cleaned(str(causes[-1]), api.token) or type(causes[-1]).__name__}"
    what, advice = HTTP_ADVICE.get(status, SERVER_ERROR if status >= 500 else OTHER_ERROR)
    messages = (getattr(cause, "server_message", None) for cause in causes)
    message = _cleaned(next(filter(None, messages), ""), api.token)
    reason = f"{what.format(repository)} ({status}{': ' if message else ''}{message})"
    return f"{reason}; {advice}" if advice else reason


def _cleaned(text: str, token: str) -> str:
    """Someone else's text on one line, cut short, without the token and control characters."""
    text = text.replace(token, "<token>")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]} …"
