"""Faults of an embedder or a store: transient, rate-limited or refused, by status or exception; and those of Chroma in this process.

Messages never contain keys, queries or passages: anything a service quotes is removed.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp

from searchr1_async.boundary.network import seconds_asked
from searchr1_async.errors import SearchError, StoreError

PASSING_STATUSES = frozenset({408, 409, 425, 499, 500, 502, 503, 504})
"""Worth a retry; 409: two clients create the same collection at once. Those over 511 are a gateway's, and worth one too."""
# SQLite's messages while another process writes to the folder.
_DATABASE_BUSY = re.compile(r"database( table| schema)? is locked|database is busy|\bcode: (5|6|261|262|517)\b", re.I)
_DIMENSIONS = re.compile(r"dimension of (\d+), got (\d+)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^'\\]|\\.)*'|`[^`]*`")


class PassingFault(SearchError):
    """Transient: a broken connection, a 5xx, a timeout, a truncated answer.

    ``cause`` is for the statistics (``"503"``, ``"reset"``, …), ``retry_after`` in seconds, None if the service gave none.
    """

    def __init__(self, message: str, *, cause: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after = retry_after


class TooManyRequests(PassingFault):
    """Rate limit (429, or 503 with ``Retry-After``): slows down all requests, not only this one."""

    def __init__(self, message: str, *, cause: str = "429", retry_after: float | None = None) -> None:
        super().__init__(message, cause=cause, retry_after=retry_after)


class RefusedInput(SearchError):
    """The service refuses the request because of an item in it; its parts may succeed on their own."""


class MissingCollection(StoreError):
    """The collection does not exist, or was recreated with another id."""

    def __init__(self, message: str) -> None:
        super().__init__(message, is_fatal=True)


@dataclass(frozen=True, slots=True)
class Wording:
    """A service over HTTP in messages. The one table of statuses and exceptions.

    ``failure`` is raised for permanent faults; ``denied``, ``missing`` and ``unreachable`` say what to do about a 401 or 403, a 404 or
    405, and a refused connection.
    """

    name: str
    failure: type[SearchError]
    denied: str
    missing: str
    unreachable: str

    def of_status(self, status: int, said: str = "", retry_after: float | None = None) -> SearchError:
        """The fault of an answer of status 300 or above; ``said`` quotes nothing of the request."""
        at = f"{self.name}: {status}{f' {said}' if said else ''}"
        if status == 429 or (status == 503 and retry_after is not None):
            return TooManyRequests(at, cause=str(status), retry_after=retry_after)
        if status in PASSING_STATUSES or status > 511:
            return PassingFault(at, cause=str(status), retry_after=retry_after)
        if status in (400, 413, 422):
            return RefusedInput(at)
        denied, missing = f"access denied: {self.denied}", self.missing
        other = "it refuses all requests" if status >= 400 else "it redirects elsewhere: use that address"
        remedy = {401: denied, 403: denied, 404: missing, 405: missing}.get(status, other)
        return self.failure(f"{at}: {remedy}", is_fatal=True)

    def of_exception(self, error: Exception) -> SearchError:
        """The fault of a request without a readable answer."""
        kind = type(error).__name__
        match error:
            case SearchError():
                return error
            case ssl.SSLCertVerificationError():  # includes aiohttp's
                return self.failure(
                    f"{self.name}: its TLS certificate is not trusted: check the address, or set SSL_CERT_FILE to the certificates of "
                    "your network",
                    is_fatal=True,
                )
            case aiohttp.InvalidURL():
                return self.failure(f"{self.name}: its address is not a valid URL", is_fatal=True)
            case TimeoutError():  # includes aiohttp's timeouts
                return PassingFault(f"{self.name}: no answer in time", cause="timeout")
            case aiohttp.ClientConnectorError():
                return PassingFault(f"{self.name} does not answer ({kind}): {self.unreachable}", cause="unreachable")
            case aiohttp.ClientConnectionError() | aiohttp.ClientPayloadError() | OSError():
                return PassingFault(f"{self.name}: the connection broke ({kind})", cause="reset")
            case aiohttp.ClientError() | ValueError() | TypeError() | AttributeError() | KeyError():
                return malformed(self.name)
            case _:
                return self.failure(f"{self.name} failed ({kind})")


def malformed(where: str) -> PassingFault:
    """The fault for a successful response that cannot be parsed: truncated, or a gateway's page."""
    return PassingFault(f"{where} sent a response that cannot be read", cause="malformed")


def fault_of_embedded(where: str, error: Exception) -> SearchError:
    """The fault for an exception of in-process Chroma."""
    from chromadb.errors import ChromaError, InvalidArgumentError, NotFoundError

    if isinstance(error, SearchError):
        return error
    text = str(error).strip()
    if isinstance(error, NotFoundError):
        return MissingCollection(f"{where} does not exist")
    if found := wrong_dimension(where, text):
        return found
    # Exceptions that are not Chroma's own may quote the input.
    because = f"{type(error).__name__}{f': {without_quotes(text)}' if isinstance(error, ChromaError) else ''}"
    if _DATABASE_BUSY.search(text):
        return PassingFault(f"{where} is locked by another process ({because})", cause="locked")
    if isinstance(error, InvalidArgumentError):
        return RefusedInput(f"{where} rejects a request ({because})")
    return StoreError(f"{where} failed ({because})")


def wrong_dimension(where: str, said: str) -> StoreError | None:
    """The fault if Chroma's message says that vectors have another dimension than the collection."""
    if (found := _DIMENSIONS.search(said)) is None:
        return None
    return StoreError(
        f"{where} was built with another embedder (dimension {found[1]}, got {found[2]}): search it with the embedder it was "
        "built with",
        is_fatal=True,
    )


def without_quotes(text: str) -> str:
    return " ".join(_QUOTED.sub("…", text).split())[:300]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the service asks to wait by ``Retry-After``, 0 for a past time, None if it does not say. Headers ignore case."""
    said = headers.get("Retry-After")
    return None if said is None else seconds_asked(said, datetime.now(UTC))
