"""The Tinker service at the edge: whether it is healthy, and what the calls of the ``tinker`` SDK raise.

Importing the SDK loads torch if it is installed, so only what talks to a Tinker service imports this module.
"""

from __future__ import annotations

import json

import anyio
import httpx
import tinker

from searchr1_async.boundary.network import prepare_proxies
from searchr1_async.errors import ServiceUnavailableError

SDK_FAULTS: tuple[type[Exception], ...] = (
    tinker.TinkerError,
    httpx.HTTPError,
    # A client closed meanwhile, and other states that the SDK does not expect.
    RuntimeError,
    AssertionError,
    ValueError,
    KeyError,
    # Out of file descriptors, or an unreadable credential file.
    OSError,
)
"""What an SDK call may raise. Catch :class:`TimeoutError`, also an ``OSError``, before."""

PASSING_FAULTS: tuple[type[Exception], ...] = (
    tinker.APIConnectionError,
    tinker.InternalServerError,
    tinker.RateLimitError,
    TimeoutError,
)
"""Raised while a service is temporarily unavailable."""

_LONGEST = 600
"""Maximum characters of a message: a response body may be a whole page."""


async def probe(url: str, timeout: float = 10.0) -> None:
    """Checks that a Tinker service responds within ``timeout`` seconds. A response that demands an API key counts.

    Raises:
        ServiceUnavailableError: a timeout, an error, or not a Tinker service; the message names the URL.
        ConfigurationError: see :func:`prepare_proxies`.
    """
    prepare_proxies(url)
    async with health_client() as client:
        if (problem := await health_problem(url, timeout, client)) is not None:
            raise ServiceUnavailableError(f"the Tinker service at {url} {problem}")


def health_client() -> httpx.AsyncClient:
    """A client for repeated calls of :func:`health_problem`: a context manager."""
    return httpx.AsyncClient(timeout=None, follow_redirects=True)


async def health_problem(url: str, timeout: float, client: httpx.AsyncClient) -> str | None:
    """What is wrong with a Tinker service, as a predicate after "the service at …"; None if healthy. ``timeout`` is in seconds."""
    address = f"{url.rstrip('/')}/api/v1/healthz"
    try:
        with anyio.fail_after(timeout):
            response = await client.get(address)
    except TimeoutError:
        return f"did not answer within {timeout:g} s"
    except (httpx.HTTPError, OSError) as error:
        return f"cannot be reached: {type(error).__name__}: {str(error) or repr(error.__cause__)}"
    if response.status_code in (401, 403, 429):
        return None
    status = f"GET {address}: {response.status_code} {response.reason_phrase}".rstrip()
    if response.status_code >= 500:
        return f"responds with an error ({status}): the service, or a proxy in front of it, is down"
    try:
        is_healthy = json.loads(response.content).get("status") == "ok"
    except (ValueError, AttributeError):  # no JSON, or no object
        is_healthy = False
    return None if is_healthy else f"answers, but not as a Tinker service: something else is running there ({status})"


def fault_text(error: BaseException) -> str:
    """An SDK error in one line: type, the service's message, and the causes of a bare "connection error"."""
    texts, cause = [_message_of(error)], error.__cause__
    while isinstance(error, tinker.APIConnectionError) and cause is not None:
        texts.append(f"({type(cause).__name__}: {_message_of(cause)})")
        cause = cause.__cause__
    text = " ".join(f"{type(error).__name__}: {' '.join(texts)}".split())
    if "oo many open files" in text:
        text += ": raise their limit (ulimit -n)"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def fault_words(error: BaseException) -> str:
    """The service's message without the SDK's wrapping: ``… for self.request_id='…' and expected type …``."""
    return str(error).removeprefix("Request failed: ").partition(" for self.request_id=")[0]


def _message_of(error: BaseException) -> str:
    if isinstance(error, tinker.APIStatusError) and isinstance(body := error.body, dict):
        for name in ("detail", "message", "error"):
            if isinstance(said := body.get(name), str) and said:
                return f"{error.status_code} {said}"
    return fault_words(error)
