"""Which fault an error of the Gemini client is: whether a retry mends it, and how much of its words may be passed on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from searchr1_async.boundary.retry_after import seconds_asked
from searchr1_async.errors import EmbeddingError, SearchError
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests

KEY_REMEDY = "set GEMINI_API_KEY to a key from https://aistudio.google.com/apikey that may use this API"
CREDENTIALS_REMEDY = (
    "run `gcloud auth application-default login`, or let GOOGLE_APPLICATION_CREDENTIALS name the file of a service account "
    "that may use Vertex AI in the project"
)

_PASSING = {408, 499, 500, 502, 503, 504}
_KEY_REASONS = {"API_KEY_INVALID", "API_KEY_EXPIRED", "API_KEY_NOT_FOUND"}
_LONGEST_MESSAGE = 300
"""Characters of the service's own message that are passed on."""


def classify(
    error: Exception, *, where: str, on_vertex: bool, texts: Sequence[str] = (), secrets: Sequence[str] = ()
) -> SearchError:
    """The fault that an exception of google-genai, aiohttp or google-auth is.

    Args:
        where: the embedder's name, for the message.
        on_vertex: which of the two services was asked, for the remedy.
        texts: what was to be embedded: none of its words gets into the message.
        secrets: the key or token: likewise.
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
            return PassingFault(f"{where}: Google's token server cannot be reached ({kind})", cause="token")
        case google_auth.GoogleAuthError() if error.retryable:
            return PassingFault(f"{where}: Google's token server fails ({kind})", cause="token")
        case google_auth.GoogleAuthError():
            return EmbeddingError(f"{where}: Google takes no credentials ({kind}): {remedy}", is_fatal=True)
        case TimeoutError():
            return PassingFault(f"{where}: no answer in time", cause="timeout")
        case aiohttp.ClientConnectorCertificateError():
            return EmbeddingError(
                f"{where}: its certificate is not trusted: let SSL_CERT_FILE name the certificates of your network",
                is_fatal=True,
            )
        case aiohttp.ClientConnectorError():
            return PassingFault(f"{where}: cannot be reached ({kind})", cause="unreachable")
        case aiohttp.ClientPayloadError() | json.JSONDecodeError() | UnicodeDecodeError():
            return PassingFault(f"{where}: an answer that is cut short or no JSON ({kind})", cause="malformed")
        case aiohttp.ClientError() | OSError():
            return PassingFault(f"{where}: the connection broke ({kind})", cause="reset")
        case ValueError() | TypeError() | AttributeError() | KeyError():
            # The client builds its objects from whatever JSON came: pydantic's ValidationError is a ValueError.
            return PassingFault(f"{where}: an answer of another shape than expected ({kind})", cause="malformed")
        case _:
            return EmbeddingError(f"{where}: the client failed ({kind}: {redact(str(error), texts, secrets)})")


def _of_answer(error: Any, where: str, remedy: str, texts: Sequence[str], secrets: Sequence[str]) -> SearchError:
    """The fault of an answer with an error status; ``error`` is a ``google.genai.errors.APIError``."""
    code, details = int(error.code or 0), list(_details(error.details))
    headers = getattr(error.response, "headers", None) or {}
    said = redact(str(error.message or ""), texts, secrets)
    at = f"{where}: {code} {_word(error.status)}".rstrip()
    wait = retry_after(headers, details)
    if code == 429:
        quota = ", ".join(sorted(_quotas(details)))
        return TooManyRequests(f"{at}{f' of the quota {quota}' if quota else ''}: {said}", retry_after=wait)
    if code == 503 and wait is not None:
        return TooManyRequests(f"{at}: {said}", cause="503", retry_after=wait)
    if code in _PASSING:
        return PassingFault(f"{at}: {said}", cause=str(code), retry_after=wait)
    reasons = {str(detail.get("reason")) for detail in details}
    if code in (401, 403) or reasons & _KEY_REASONS or _speaks_of_the_key(error.message):
        return EmbeddingError(f"{at}: access is refused ({said}): {remedy}", is_fatal=True)
    if code == 404:
        return EmbeddingError(
            f"{at}: no such model there ({said}): check the model's name, and on Vertex AI that the region has it",
            is_fatal=True,
        )
    if code in (400, 413) and error.status != "FAILED_PRECONDITION":
        return RefusedInput(f"{at}: {said}")
    return EmbeddingError(f"{at}: no request is taken ({said})", is_fatal=True)


def _speaks_of_the_key(message: object) -> bool:
    return isinstance(message, str) and bool(re.match(r"API key (not valid|expired|not found)", message))


def _word(status: object) -> str:
    """A status as the service names them; anything else might be words of a request."""
    return status if isinstance(status, str) and re.fullmatch(r"[A-Z][A-Z_]{1,40}", status) else ""


def _details(body: object) -> Iterator[Mapping[str, Any]]:
    """The ``details`` of an error body, those that are objects."""
    error = body.get("error", body) if isinstance(body, Mapping) else None
    details = error.get("details") if isinstance(error, Mapping) else None
    yield from (one for one in details if isinstance(one, Mapping)) if isinstance(details, list) else ()


def _quotas(details: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names of the quotas that a 429 says are used up, which tell a minute's from a day's."""
    for detail in details:
        violations = detail.get("violations")
        for violation in violations if isinstance(violations, list) else ():
            name = violation.get("quotaId") if isinstance(violation, Mapping) else None
            if isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z-]{1,120}", name):
                yield name


def retry_after(
    headers: Mapping[str, str], details: Sequence[Mapping[str, Any]] = (), *, now: datetime | None = None
) -> float | None:
    """Seconds that an answer asks to wait: the longest of what it says, 0 for a time gone by, None if it says nothing.

    Args:
        headers: ``Retry-After`` in seconds or as an HTTP date (RFC 9110, section 10.2.3).
        details: of the error body: ``google.rpc.RetryInfo`` with a ``retryDelay`` such as ``"34s"`` or ``"0.25s"``.
        now: the time of day; for tests.
    """
    header = headers.get("Retry-After")
    said = [seconds_asked(header, now or datetime.now(UTC))] if header else []
    said += [_from_duration(detail["retryDelay"]) for detail in details if "retryDelay" in detail]
    return max((seconds for seconds in said if seconds is not None), default=None)


def _from_duration(value: object) -> float | None:
    """A ``google.protobuf.Duration`` as JSON writes it."""
    if not isinstance(value, str) or not re.fullmatch(r"\d{1,12}(\.\d{1,9})?s", value, re.ASCII):
        return None
    return float(value[:-1])


def redact(message: str, texts: Sequence[str] = (), secrets: Sequence[str] = ()) -> str:
    """What of the service's message may be passed on: its words but those that stand in a text, and no key.

    A message may quote a text cut anywhere, so each run of letters and digits that is found anywhere in a text goes, and
    whatever is not ASCII. That loses words such as "is" too; what is left still tells, say, that an API is not enabled.
    """
    for secret in secrets:
        if secret:
            message = message.replace(secret, "…")
    quotable, secret = "\n".join(texts).lower(), "\n".join(secrets)

    def pass_on(match: re.Match[str]) -> str:
        run = match.group()
        # A key may be quoted in part; no word of a message has over 24 letters and digits in a row, and keys do.
        is_private = not run.isascii() or run.lower() in quotable or (len(run) > 3 and run in secret) or len(run) > 24
        return "…" if is_private else run

    kept = re.sub(r"[A-Za-z0-9]+|[^\x00-\x7f]+", pass_on, message)
    return re.sub(r"…([^A-Za-z0-9]*…)*", "…", " ".join(kept.split()))[:_LONGEST_MESSAGE]
