"""Classifies errors of the Gemini client, and redacts their messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from searchr1_async.boundary.network import seconds_asked
from searchr1_async.errors import EmbeddingError, SearchError
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests

KEY_REMEDY = "set GEMINI_API_KEY to a key from https://aistudio.google.com/apikey that may use this API"
CREDENTIALS_REMEDY = (
    "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account "
    "that may use Vertex AI in the project"
)

_PASSING = {408, 499, 500, 502, 503, 504}
_KEY_REASONS = {"API_KEY_INVALID", "API_KEY_EXPIRED", "API_KEY_NOT_FOUND"}
_LONGEST_MESSAGE = 300
"""Characters kept of the service's own message."""


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
    wait = retry_after(headers, details)
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


def retry_after(
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
