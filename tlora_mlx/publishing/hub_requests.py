"""Requests to the Hugging Face Hub: silent, repeated, and their failures in one sentence."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_chain, wait_fixed

from tlora_mlx.errors import RunError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

# Seconds before each new attempt: the client itself retries only some requests.
WAITS = (1, 2, 4)
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


@contextmanager
def silent_client() -> Iterator[None]:
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


def retried(call: Callable[[], T]) -> T:
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


def reason(error: Exception, repository: str, api: HfApi) -> str:
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
