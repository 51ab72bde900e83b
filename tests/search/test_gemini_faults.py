"""Classification and redaction of the Gemini client's errors."""

from __future__ import annotations

import json
import re
import ssl
import string
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from google.auth import exceptions as google_auth
from google.genai.errors import APIError, ClientError, ServerError
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from searchr1_async.errors import EmbeddingError, SearchError
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests, classify, redact
from searchr1_async.search.faults import gemini_retry_after as retry_after

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CONNECTION = ConnectionKey("host", 443, True, True, None, None, None)


class Answer:
    """The fields of an aiohttp response that are read."""

    def __init__(self, headers: dict[str, str]) -> None:
        self.headers = CIMultiDictProxy(CIMultiDict(headers))


def answered(
    code: int,
    status: str = "",
    message: str = "Something",
    *,
    headers: dict[str, str] | None = None,
    details: list[Any] | None = None,
) -> APIError:
    """The error the client raises for a response."""
    body = {"error": {"code": code, "status": status, "message": message, "details": details or []}}
    kind = ClientError if code < 500 else ServerError
    response: Any = Answer(headers or {})
    return kind(code, body, response)


def fault_of(error: Exception, *, on_vertex: bool = False) -> SearchError:
    return classify(error, where="the embedder", on_vertex=on_vertex)


RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}


@pytest.mark.parametrize(
    ("error", "cause", "wait"),
    [
        (answered(429, headers={"retry-after": "7"}), "429", 7),
        (answered(429, details=[RETRY_INFO]), "429", 34),
        (answered(429, headers={"Retry-After": "7"}, details=[RETRY_INFO]), "429", 34),
        (answered(429), "429", None),
        (answered(429, details=["odd", {"violations": "odd"}, {"retryDelay": None}]), "429", None),
        (answered(503, headers={"Retry-After": "2"}), "503", 2),
    ],
)
def test_slower(error: Exception, cause: str, wait: float | None) -> None:
    fault = fault_of(error)
    assert type(fault) is TooManyRequests
    assert (fault.cause, fault.retry_after, fault.is_fatal) == (cause, wait, False)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        *((answered(code), str(code)) for code in (408, 499, 500, 502, 503, 504)),
        (TimeoutError(), "timeout"),
        (aiohttp.ServerTimeoutError(), "timeout"),
        (aiohttp.ServerDisconnectedError(), "reset"),
        (aiohttp.ClientOSError(104, "reset by peer"), "reset"),
        (ConnectionResetError(), "reset"),
        (aiohttp.ClientConnectorError(CONNECTION, OSError(111, "refused")), "unreachable"),
        (aiohttp.ClientPayloadError(), "malformed"),
        (json.JSONDecodeError("odd", "doc", 0), "malformed"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd"), "malformed"),
        (KeyError("values"), "malformed"),
        (google_auth.TransportError("away"), "token"),
        (google_auth.RefreshError("away", retryable=True), "token"),
    ],
)
def test_worth_another_try(error: Exception, cause: str) -> None:
    fault = fault_of(error)
    assert type(fault) is PassingFault
    assert fault.cause == cause
    assert "the embedder" in str(fault)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (answered(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key."), "GEMINI_API_KEY"),
        (answered(400, "INVALID_ARGUMENT", "API key expired. Please renew the API key."), "GEMINI_API_KEY"),
        (answered(400, "INVALID_ARGUMENT", details=[{"reason": "API_KEY_INVALID"}]), "GEMINI_API_KEY"),
        (answered(401, "UNAUTHENTICATED"), "GEMINI_API_KEY"),
        (answered(403, "PERMISSION_DENIED"), "GEMINI_API_KEY"),
        (answered(404, "NOT_FOUND"), "model"),
        (answered(400, "FAILED_PRECONDITION", "User location is not supported"), "location"),
        (answered(405), "the service refuses all requests"),
        (aiohttp.ClientConnectorCertificateError(CONNECTION, ssl.SSLCertVerificationError("odd")), "SSL_CERT_FILE"),
        (google_auth.DefaultCredentialsError("none found"), "GEMINI_API_KEY"),
    ],
)
def test_for_good(error: Exception, says: str) -> None:
    fault = fault_of(error)
    assert type(fault) is EmbeddingError
    assert fault.is_fatal
    assert says in str(fault)


@pytest.mark.parametrize("error", [answered(401), answered(403), google_auth.DefaultCredentialsError("none found")])
def test_on_vertex_the_remedy_is_another(error: Exception) -> None:
    assert "gcloud auth" in str(fault_of(error, on_vertex=True))


@pytest.mark.parametrize("code", [400, 413])
def test_refused_for_what_is_in_it(code: int) -> None:
    assert type(fault_of(answered(code, "INVALID_ARGUMENT"))) is RefusedInput


def test_what_nobody_foresaw_ends_the_episode_only() -> None:
    fault = classify(RuntimeError("no secret-token"), where="the embedder", on_vertex=True, secrets=["secret-token"])
    assert type(fault) is EmbeddingError
    assert not fault.is_fatal
    assert "RuntimeError" in str(fault)
    assert "secret" not in str(fault)


def test_a_fault_is_itself() -> None:
    fault = PassingFault("odd", cause="500")
    assert fault_of(fault) is fault


# --- retry-after ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        ("1.5", 1.5),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0),
        ("Sun, 01 Mar 2026 12:00:30", 30),
        *((odd, None) for odd in ("-3", "soon", "", "nan", "inf", "Sun, 99 Mar 2026 12:00:30 GMT")),
    ],
)
def test_retry_after_header(header: str, seconds: float | None) -> None:
    assert retry_after({"Retry-After": header}, now=NOW) == seconds


@settings(deadline=None)
@given(st.integers(-10_000, 1_000_000))
def test_any_date_is_its_distance(seconds: int) -> None:
    date = format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)
    assert retry_after({"Retry-After": date}, now=NOW) == max(0, seconds)


@settings(deadline=None)
@given(st.decimals(0, 10**9, places=9))
def test_any_duration_is_its_seconds(seconds: Any) -> None:
    assert retry_after({}, [{"retryDelay": f"{seconds:f}s"}]) == float(seconds)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("details", "retryDelay", "violations", "quotaId", "reason", "@type")
BODIES = st.recursive(
    JSON, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)


@settings(deadline=None)
@given(st.text(max_size=30), BODIES, st.sampled_from([400, 404, 429, 500, 503]))
def test_no_answer_breaks_the_classification(header: str, body: Any, code: int) -> None:
    response: Any = Answer({"Retry-After": header})
    fault = fault_of(ClientError(code, {"error": {**body, "code": code} if isinstance(body, dict) else body}, response))
    wait = fault.retry_after if isinstance(fault, PassingFault) else None
    assert wait is None or 0 <= wait < float("inf")


# --- redaction ------------------------------------------------------------------------------------------------------------

WORDS = st.text(string.ascii_letters + string.digits, min_size=1, max_size=12)
TEXTS = st.lists(
    st.text(string.ascii_letters + string.digits + " .,'ßü東", min_size=1, max_size=60), min_size=1, max_size=4
)


@settings(deadline=None)
@given(TEXTS, st.data())
def test_no_quoted_piece_of_a_text_is_passed_on(texts: list[str], data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(texts))
    start = data.draw(st.integers(0, len(text) - 1))
    piece = text[start : data.draw(st.integers(start + 1, len(text)))]
    passed = redact(f'Content "{piece}" exceeds: {piece.upper()}', texts)
    frame = {"content", "exceeds"}
    for run in re.findall(r"[a-z0-9]+", piece.lower()):
        assert run not in set(re.findall(r"[a-z0-9]+", passed.lower())) - frame
    assert passed.replace("…", "").isascii()


@settings(deadline=None)
@given(st.text(string.ascii_letters + string.digits + "-_", min_size=30, max_size=45), st.data())
def test_no_piece_of_a_key_is_passed_on(key: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(key) - 12))
    piece = key[start : start + 12]
    passed = redact(f"API key {key} not valid: {piece}***", secrets=[key])
    assert key not in passed
    assert all(run not in passed for run in re.findall(r"[A-Za-z0-9]{7,}", piece))


def test_a_token_that_nobody_knows_is_too_long_to_be_a_word() -> None:
    assert redact(f"token ya29.{'aB3' * 20} expired") == "token ya29.… expired"


def test_the_services_own_words_are_passed_on() -> None:
    message = "The input token count (20500) exceeds the maximum of 20000."
    assert redact(message, ["Quagmire"]) == message
    assert len(redact("word " * 1_000)) == 300
