"""Maps Chroma's HTTP errors, connection errors and in-process exceptions to the search's faults.

Messages never contain queries or passages: anything Chroma quotes is removed.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus

import aiohttp
import orjson

from searchr1_async.boundary.network import seconds_asked
from searchr1_async.errors import SearchError, StoreError
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests

PASSING_STATUSES = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.CONFLICT,  # two clients create the same collection at once
        HTTPStatus.TOO_EARLY,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
"""Statuses worth a retry."""
# SQLite's messages while another process writes to the folder.
_DATABASE_BUSY = re.compile(r"database( table| schema)? is locked|database is busy|\bcode: (5|6|261|262|517)\b", re.I)
_DIMENSIONS = re.compile(r"dimension of (\d+), got (\d+)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^'\\]|\\.)*'|`[^`]*`")


class MissingCollection(StoreError):
    """The collection does not exist, or was recreated with another id."""

    def __init__(self, message: str) -> None:
        super().__init__(message, is_fatal=True)


def fault_of_answer(where: str, status: int, headers: Mapping[str, str], body: bytes) -> SearchError:
    """The fault for an HTTP error response.

    Args:
        where: the store's name.
        status: HTTP status, 300 or above.
        headers: response headers; ``Retry-After`` is read, in seconds or as a date.
        body: Chroma's is ``{"error": "<kind>", "message": "<text>"}``; a gateway's may be anything.
    """
    kind, said = error_in(body)
    said = _without_quotes(said)
    because = f"{status}{f' {kind}' if kind else ''}{f': {said}' if said else ''}"
    wait = retry_after(headers, datetime.now(UTC))
    if status == HTTPStatus.TOO_MANY_REQUESTS or (status == HTTPStatus.SERVICE_UNAVAILABLE and wait is not None):
        return TooManyRequests(f"{where} is rate limiting ({because})", cause=str(status), retry_after=wait)
    if status in PASSING_STATUSES or status > HTTPStatus.NETWORK_AUTHENTICATION_REQUIRED:
        return PassingFault(f"{where} failed temporarily ({because})", cause=str(status), retry_after=wait)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return StoreError(
            f"{where} rejects these credentials ({status}): set token (for Chroma Cloud CHROMA_API_KEY), and check that "
            "it has access to this tenant and database",
            is_fatal=True,
        )
    if status == HTTPStatus.NOT_FOUND:
        if kind == "NotFoundError":
            return MissingCollection(
                f"{where} does not exist: check the name, or serve the folder that holds it (`chroma run --path <folder>`)"
            )
        return StoreError(f"{where}: the server is not Chroma 0.6 or newer (404): check host and port", is_fatal=True)
    if status < HTTPStatus.BAD_REQUEST:
        return StoreError(
            f"{where} redirects elsewhere ({status}): use that address, with ssl if needed", is_fatal=True
        )
    if found := _DIMENSIONS.search(said):
        return wrong_dimension(where, int(found[1]), int(found[2]))
    if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY):
        return RefusedInput(f"{where} rejects a request ({because})")
    return StoreError(f"{where} failed ({because}): check that it is a Chroma server, and read its logs", is_fatal=True)


def fault_of_exception(where: str, error: Exception) -> SearchError:
    """The fault for a failed request: no connection, a broken one, a timeout, or a malformed response."""
    kind = type(error).__name__
    match error:
        case SearchError():
            return error
        case ssl.SSLError() | aiohttp.ClientSSLError() if not _is_cut_short(error):
            return StoreError(
                f"{where}: no trusted TLS connection ({kind}): check ssl, the port and the certificate", is_fatal=True
            )
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError():
            return StoreError(f"{where}: the address is not a valid HTTP URL: check host and port", is_fatal=True)
        case TimeoutError():  # includes aiohttp's timeouts
            return PassingFault(f"{where} did not answer in time ({kind})", cause="timeout")
        case aiohttp.ClientConnectorError() if not isinstance(error, aiohttp.ClientSSLError):
            cause = "name" if isinstance(error, aiohttp.ClientConnectorDNSError) else "refused"
            return PassingFault(
                f"{where} does not respond ({kind}): check that `chroma run` is running, and its address", cause=cause
            )
        case aiohttp.ClientPayloadError():
            return PassingFault(f"{where} sent an incomplete response ({kind})", cause="reset")
        case aiohttp.ClientConnectionError() | ConnectionError() | OSError():
            return PassingFault(f"{where} closed the connection ({kind})", cause="reset")
        case aiohttp.ClientResponseError() | orjson.JSONDecodeError():
            return malformed(where)
        case _:
            return StoreError(f"{where} failed ({kind})")


def _is_cut_short(error: BaseException) -> bool:
    """Whether a TLS connection was closed early, as by a server that stops; other TLS errors are permanent."""
    return isinstance(getattr(error, "os_error", error), ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)


def fault_of_embedded(where: str, error: Exception) -> SearchError:
    """The fault for an exception of in-process Chroma."""
    from chromadb.errors import ChromaError, InvalidArgumentError, NotFoundError

    if isinstance(error, SearchError):
        return error
    text = str(error).strip()
    if isinstance(error, NotFoundError):
        return MissingCollection(f"{where} does not exist")
    if found := _DIMENSIONS.search(text):
        return wrong_dimension(where, int(found[1]), int(found[2]))
    # Exceptions that are not Chroma's own may quote the input.
    because = f"{type(error).__name__}{f': {_without_quotes(text)}' if isinstance(error, ChromaError) else ''}"
    if _DATABASE_BUSY.search(text):
        return PassingFault(f"{where} is locked by another process ({because})", cause="locked")
    if isinstance(error, InvalidArgumentError):
        return RefusedInput(f"{where} rejects a request ({because})")
    return StoreError(f"{where} failed ({because})")


def wrong_dimension(where: str, expected: int, got: int) -> StoreError:
    return StoreError(
        f"{where} was built with another embedder (dimension {expected}, got {got}): search it with the embedder it was "
        "built with",
        is_fatal=True,
    )


def malformed(where: str) -> PassingFault:
    """The fault for a successful response that cannot be parsed: truncated, or a gateway's page."""
    return PassingFault(f"{where} sent a response that cannot be read", cause="malformed")


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds from ``Retry-After``, given in seconds or as a date (RFC 9110, 10.2.3); None if absent."""
    value = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
    return seconds_asked(value, now)


def error_in(body: bytes) -> tuple[str, str]:
    """Kind and text of ``{"error": …, "message": …}``; both empty for anything else, such as a gateway's page."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "", ""
    if not isinstance(found, dict) or not re.fullmatch(r"\w{1,60}", str(found.get("error", "")), re.ASCII):
        return "", ""
    return str(found["error"]), str(found.get("message", ""))


def _without_quotes(text: str) -> str:
    return " ".join(_QUOTED.sub("…", text).split())[:300]
