"""Faults of an embedder or a store: transient, rate-limited or refused; and what Chroma's, HTTP's and Gemini's errors map to.

Messages never contain keys, queries or passages: anything a service quotes is removed.
"""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import aiohttp
import orjson

from searchr1_async.boundary.network import seconds_asked
from searchr1_async.errors import EmbeddingError, SearchError, StoreError

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
KEY_REMEDY = "set GEMINI_API_KEY to a key from https://aistudio.google.com/apikey that may use this API"
CREDENTIALS_REMEDY = (
    "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account "
    "that may use Vertex AI in the project"
)
_PASSING = {408, 499, 500, 502, 503, 504}
_KEY_REASONS = {"API_KEY_INVALID", "API_KEY_EXPIRED", "API_KEY_NOT_FOUND"}
_LONGEST_MESSAGE = 300
"""Characters kept of the service's own message."""


class PassingFault(SearchError):
    """Transient: a broken connection, a 5xx, a timeout, a truncated answer.

    ``message`` contains no key and no query, ``cause`` is for the statistics (``"503"``, ``"reset"``, ``"timeout"``,
    ``"malformed"``), ``retry_after`` is in seconds, None if the service gave none.
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
    wait = chroma_retry_after(headers, datetime.now(UTC))
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


def chroma_retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
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


def classify(
    error: Exception, *, where: str, on_vertex: bool, texts: Sequence[str] = (), secrets: Sequence[str] = ()
) -> SearchError:
    """Maps an exception of google-genai, aiohttp or google-auth to a fault.

    ``where`` is the embedder's name; ``on_vertex`` selects the remedy; ``texts`` and ``secrets`` are redacted.
    """
    import aiohttp
    from google.auth import exceptions as google_auth
    from google.genai import errors as genai

    remedy = CREDENTIALS_REMEDY if on_vertex else KEY_REMEDY
    kind = type(error).__name__
    match error:
        case SearchError():
            return error
        case genai.APIError():
            return _of_answer(error, where, remedy, texts, secrets)
        case google_auth.TransportError():
            return PassingFault(f"{where}: cannot reach Google's token server ({kind})", cause="token")
        case google_auth.GoogleAuthError() if error.retryable:
            return PassingFault(f"{where}: Google's token server failed ({kind})", cause="token")
        case google_auth.GoogleAuthError():
            return EmbeddingError(f"{where}: Google refused the credentials ({kind}): {remedy}", is_fatal=True)
        case TimeoutError():
            return PassingFault(f"{where}: no answer in time", cause="timeout")
        case aiohttp.ClientConnectorCertificateError():
            return EmbeddingError(
                f"{where}: its certificate is not trusted: set SSL_CERT_FILE to the certificates of your network",
                is_fatal=True,
            )
        case aiohttp.ClientConnectorError():
            return PassingFault(f"{where}: unreachable ({kind})", cause="unreachable")
        case aiohttp.ClientPayloadError() | json.JSONDecodeError() | UnicodeDecodeError():
            return PassingFault(f"{where}: the answer is truncated or not JSON ({kind})", cause="malformed")
        case aiohttp.ClientError() | OSError():
            return PassingFault(f"{where}: the connection broke ({kind})", cause="reset")
        case ValueError() | TypeError() | AttributeError() | KeyError():
            # Raised by the client on unexpected JSON; pydantic's ValidationError is a ValueError.
            return PassingFault(f"{where}: unexpected answer format ({kind})", cause="malformed")
        case _:
            return EmbeddingError(f"{where}: the client failed ({kind}: {redact(str(error), texts, secrets)})")


def _of_answer(error: Any, where: str, remedy: str, texts: Sequence[str], secrets: Sequence[str]) -> SearchError:
    """The fault of an error response; ``error`` is a ``google.genai.errors.APIError``."""
    code, details = int(error.code or 0), list(_details(error.details))
    headers = getattr(error.response, "headers", None) or {}
    said = redact(str(error.message or ""), texts, secrets)
    at = f"{where}: {code} {_word(error.status)}".rstrip()
    wait = gemini_retry_after(headers, details)
    if code == 429:
        quota = ", ".join(sorted(_quotas(details)))
        return TooManyRequests(f"{at}{f' of the quota {quota}' if quota else ''}: {said}", retry_after=wait)
    if code == 503 and wait is not None:
        return TooManyRequests(f"{at}: {said}", cause="503", retry_after=wait)
    if code in _PASSING:
        return PassingFault(f"{at}: {said}", cause=str(code), retry_after=wait)
    reasons = {str(detail.get("reason")) for detail in details}
    if code in (401, 403) or reasons & _KEY_REASONS or _mentions_key(error.message):
        return EmbeddingError(f"{at}: access denied ({said}): {remedy}", is_fatal=True)
    if code == 404:
        return EmbeddingError(
            f"{at}: no such model ({said}): check the model's name, and on Vertex AI that the region offers it",
            is_fatal=True,
        )
    if code in (400, 413) and error.status != "FAILED_PRECONDITION":
        return RefusedInput(f"{at}: {said}")
    return EmbeddingError(f"{at}: the service refuses all requests ({said})", is_fatal=True)


def _mentions_key(message: object) -> bool:
    return isinstance(message, str) and bool(re.match(r"API key (not valid|expired|not found)", message))


def _word(status: object) -> str:
    """A status name of the service; anything else may quote the request."""
    return status if isinstance(status, str) and re.fullmatch(r"[A-Z][A-Z_]{1,40}", status) else ""


def _details(body: object) -> Iterator[Mapping[str, Any]]:
    """The objects in the ``details`` of an error body."""
    error = body.get("error", body) if isinstance(body, Mapping) else None
    details = error.get("details") if isinstance(error, Mapping) else None
    yield from (one for one in details if isinstance(one, Mapping)) if isinstance(details, list) else ()


def _quotas(details: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names of the exceeded quotas, which distinguish per-minute from per-day limits."""
    for detail in details:
        violations = detail.get("violations")
        for violation in violations if isinstance(violations, list) else ():
            name = violation.get("quotaId") if isinstance(violation, Mapping) else None
            if isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z-]{1,120}", name):
                yield name


def gemini_retry_after(
    headers: Mapping[str, str], details: Sequence[Mapping[str, Any]] = (), *, now: datetime | None = None
) -> float | None:
    """Seconds the service asks to wait: the longest of those given, 0 for a past time, None if not given.

    Args:
        headers: ``Retry-After`` in seconds or as an HTTP date (RFC 9110, section 10.2.3).
        details: of the error body: ``google.rpc.RetryInfo`` with a ``retryDelay`` such as ``"34s"`` or ``"0.25s"``.
        now: current time; for tests.
    """
    header = headers.get("Retry-After")
    said = [seconds_asked(header, now or datetime.now(UTC))] if header else []
    said += [_from_duration(detail["retryDelay"]) for detail in details if "retryDelay" in detail]
    return max((seconds for seconds in said if seconds is not None), default=None)


def _from_duration(value: object) -> float | None:
    """Parses a ``google.protobuf.Duration`` in JSON."""
    if not isinstance(value, str) or not re.fullmatch(r"\d{1,12}(\.\d{1,9})?s", value, re.ASCII):
        return None
    return float(value[:-1])


def redact(message: str, texts: Sequence[str] = (), secrets: Sequence[str] = ()) -> str:
    """The service's message without keys and without words that occur in the texts.

    A message may quote a text cut anywhere, so any run of letters and digits found in a text is removed, and so is anything
    not ASCII. That also removes words such as "is", but the rest still tells, say, that an API is not enabled.
    """
    for secret in secrets:
        if secret:
            message = message.replace(secret, "…")
    quotable, secret = "\n".join(texts).lower(), "\n".join(secrets)

    def pass_on(match: re.Match[str]) -> str:
        run = match.group()
        # A key may be quoted in part. Keys have runs of more than 24 letters and digits, words do not.
        is_private = not run.isascii() or run.lower() in quotable or (len(run) > 3 and run in secret) or len(run) > 24
        return "…" if is_private else run

    kept = re.sub(r"[A-Za-z0-9]+|[^\x00-\x7f]+", pass_on, message)
    return re.sub(r"…([^A-Za-z0-9]*…)*", "…", " ".join(kept.split()))[:_LONGEST_MESSAGE]
