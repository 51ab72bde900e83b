"""Which fault an answer or an exception of a service is: a pure table."""

from __future__ import annotations

import json
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from chromadb import errors as chroma_errors
from google.auth import exceptions as google_auth
from google.genai.errors import APIError, ClientError, ServerError
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from searchr1_async.boundary.network import seconds_asked
from searchr1_async.errors import EmbeddingError, SearchError, StoreError
from searchr1_async.search.faults import (
    MissingCollection,
    PassingFault,
    RefusedInput,
    TooManyRequests,
    Wording,
    fault_of_embedded,
    retry_after,
)
from searchr1_async.search.gemini import GeminiEmbedder, fault_of_client
from searchr1_async.search.stores.chroma_server import RemoteChroma

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KEY = ConnectionKey("host", 443, True, True, None, None, None)
WORDING = Wording("the service", StoreError, denied="pass a token", missing="check the host", unreachable="start it")


def chroma_says(kind: str, message: str) -> bytes:
    return json.dumps({"error": kind, "message": message}).encode()


def of_chroma(status: int, body: bytes, headers: dict[str, str] | None = None) -> SearchError:
    return RemoteChroma("host")._server.fault_of_answer(status, headers or {}, body)


@pytest.mark.parametrize(
    ("status", "wait", "kind"),
    [
        (429, None, TooManyRequests),
        (429, 7.0, TooManyRequests),
        (503, 0.5, TooManyRequests),
        *((status, None, PassingFault) for status in (408, 409, 425, 499, 500, 502, 503, 504, 524)),
    ],
)
def test_an_answer_that_may_be_another_one_next_time(status: int, wait: float | None, kind: type[PassingFault]) -> None:
    fault = WORDING.of_status(status, "slow", wait)
    assert type(fault) is kind
    assert isinstance(fault, PassingFault)
    assert (fault.cause, fault.retry_after, fault.is_fatal) == (str(status), wait, False)


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (401, StoreError, "pass a token"),
        (403, StoreError, "pass a token"),
        (404, StoreError, "check the host"),
        (405, StoreError, "check the host"),
        (307, StoreError, "redirects"),
        (402, StoreError, "402"),
        (501, StoreError, "501"),
        (400, RefusedInput, "400"),
        (413, RefusedInput, "413"),
        (422, RefusedInput, "422"),
    ],
)
def test_an_answer_that_stays(status: int, kind: type[SearchError], says: str) -> None:
    fault = WORDING.of_status(status)
    assert type(fault) is kind
    assert fault.is_fatal is (kind is StoreError)
    assert says in str(fault)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (aiohttp.ClientConnectorError(KEY, ConnectionRefusedError(111, "refused")), "unreachable"),
        (aiohttp.ClientConnectorDNSError(KEY, OSError(-2, "unknown")), "unreachable"),
        (aiohttp.ServerDisconnectedError(), "reset"),
        (aiohttp.ClientOSError(104, "reset"), "reset"),
        (ConnectionResetError(), "reset"),
        (aiohttp.ClientPayloadError("cut"), "reset"),
        (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLEOFError(8, "EOF")), "unreachable"),
        (aiohttp.ConnectionTimeoutError(), "timeout"),
        (aiohttp.SocketTimeoutError(), "timeout"),
        (TimeoutError(), "timeout"),
        (json.JSONDecodeError("cut", "{", 1), "malformed"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd"), "malformed"),
        (KeyError("values"), "malformed"),
        (aiohttp.ClientResponseError(None, ()), "malformed"),  # type: ignore[arg-type]
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_a_transport_that_broke(error: Exception, cause: str) -> None:
    fault = WORDING.of_exception(error)
    assert isinstance(fault, PassingFault)
    assert (fault.cause, fault.is_fatal) == (cause, False)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (aiohttp.ClientConnectorCertificateError(KEY, ssl.SSLCertVerificationError("self-signed")), "SSL_CERT_FILE"),
        (aiohttp.InvalidURL("http://"), "valid URL"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_transport_that_will_not_mend(error: Exception, says: str) -> None:
    fault = WORDING.of_exception(error)
    assert type(fault) is StoreError
    assert fault.is_fatal
    assert says in str(fault)


def test_a_bug_is_named_without_what_it_quotes() -> None:
    fault = WORDING.of_exception(RuntimeError("a bug that quotes a passage"))
    assert type(fault) is StoreError
    assert not fault.is_fatal
    assert "quotes a passage" not in str(fault)


def test_what_is_a_fault_already_stays_one() -> None:
    fault = PassingFault("x", cause="reset")
    assert WORDING.of_exception(fault) is fault
    assert fault_of_embedded("the store", fault) is fault


# --- Chroma ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (401, chroma_says("AuthorizationError", "no"), StoreError, "CHROMA_API_KEY"),
        (404, chroma_says("NotFoundError", "Collection [x] does not exist"), MissingCollection, "does not exist"),
        (404, b'{"detail":"Not Found"}', StoreError, "check host and port"),
        (
            400,
            chroma_says("InvalidArgumentError", "Collection expecting embedding with dimension of 3, got 2"),
            StoreError,
            "another embedder (dimension 3, got 2)",
        ),
        (400, chroma_says("QuotaError", "over 300 records"), RefusedInput, "over 300 records"),
    ],
)
def test_an_answer_of_chroma(status: int, body: bytes, kind: type[SearchError], says: str) -> None:
    fault = of_chroma(status, body)
    assert type(fault) is kind
    assert says in str(fault)


@pytest.mark.parametrize(
    ("error", "kind", "is_fatal"),
    [
        (
            chroma_errors.InternalError("error returned from database: (code: 5) database is locked"),
            PassingFault,
            False,
        ),
        (chroma_errors.NotFoundError("Collection [x] does not exist"), MissingCollection, True),
        (
            chroma_errors.InvalidArgumentError("Collection expecting embedding with dimension of 3, got 2"),
            StoreError,
            True,
        ),
        (chroma_errors.InvalidArgumentError("something else"), RefusedInput, False),
        (chroma_errors.InternalError("disk I/O error"), StoreError, False),
        (ValueError("Expected a title, got the passage about Luanda"), StoreError, False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_folder(error: Exception, kind: type[SearchError], is_fatal: bool) -> None:
    fault = fault_of_embedded("the store", error)
    assert type(fault) is kind
    assert fault.is_fatal is is_fatal
    assert "Luanda" not in str(fault)


@given(
    st.text(min_size=4).map(lambda text: f"LUANDA{text}LUANDA"),
    st.sampled_from([400, 422, 429, 500, 503]),
)
def test_what_chroma_quotes_of_a_request_is_not_told(text: str, status: int) -> None:
    quoted = json.dumps(text)
    body = chroma_says("ChromaError", f"documents[0]: invalid type: string {quoted}, expected a sequence at column 39")
    said = str(of_chroma(status, body))
    assert "LUANDA" not in said
    assert "expected a sequence" in said


JSON = st.recursive(
    st.none() | st.text() | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["error", "message", "detail"]), inner),
)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()), st.integers(300, 599))
def test_any_body_of_any_status_is_some_fault(body: bytes, status: int) -> None:
    fault = of_chroma(status, body)
    assert str(fault).startswith("Chroma collection")
    assert len(str(fault)) < 600


# --- Gemini ---------------------------------------------------------------------------------------------------------------


class Answer:
    """The fields of an aiohttp response that are read."""

    def __init__(self, headers: dict[str, str]) -> None:
        self.headers = CIMultiDictProxy(CIMultiDict(headers))


def answered(
    code: int, status: str = "", *, headers: dict[str, str] | None = None, details: list[Any] | None = None
) -> APIError:
    """The error the client raises for a response."""
    error = {"code": code, "status": status, "message": "Quagmire?", "details": details or []}
    kind = ClientError if code < 500 else ServerError
    response: Any = Answer(headers or {})
    return kind(code, {"error": error}, response)


def fault_of(error: Exception) -> SearchError:
    return fault_of_client(error, GeminiEmbedder(api_key="k")._session.wording)


RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}


@pytest.mark.parametrize(
    ("error", "wait"),
    [
        (answered(429, headers={"retry-after": "7"}), 7),
        (answered(429, details=[RETRY_INFO]), 34),
        (answered(429, headers={"Retry-After": "7"}, details=[RETRY_INFO]), 34),
        (answered(429), None),
        (answered(429, details=["odd", {"violations": "odd"}, {"retryDelay": None}]), None),
        (answered(503, headers={"Retry-After": "2"}), 2),
    ],
)
def test_gemini_tells_when_to_come_again(error: Exception, wait: float | None) -> None:
    fault = fault_of(error)
    assert isinstance(fault, TooManyRequests)
    assert fault.retry_after == wait


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (answered(400, "INVALID_ARGUMENT", details=[{"reason": "API_KEY_INVALID"}]), "GEMINI_API_KEY"),
        (answered(401, "UNAUTHENTICATED"), "GEMINI_API_KEY"),
        (answered(403, "PERMISSION_DENIED", details=[{"reason": "SERVICE_DISABLED"}]), "SERVICE_DISABLED"),
        (answered(404, "NOT_FOUND"), "model"),
        (answered(400, "FAILED_PRECONDITION"), "needs billing"),
        (answered(402), "refuses all requests"),
        (google_auth.DefaultCredentialsError("none found"), "GEMINI_API_KEY"),
    ],
)
def test_gemini_refuses_for_good(error: Exception, says: str) -> None:
    fault = fault_of(error)
    assert type(fault) is EmbeddingError
    assert fault.is_fatal
    assert says in str(fault)
    assert "Quagmire" not in str(fault)


@pytest.mark.parametrize(
    "error", [google_auth.TransportError("away"), google_auth.RefreshError("away", retryable=True)]
)
def test_a_token_server_that_is_away(error: Exception) -> None:
    fault = fault_of(error)
    assert isinstance(fault, PassingFault)
    assert fault.cause == "token"


def test_a_key_that_is_quoted_as_a_code_is_not_passed_on() -> None:
    key = "AIzaSyQuagmire-Quagmire_Key"
    quota = "EmbedContentRequestsPerMinutePerProject-FreeTier"
    details = [{"reason": key, "violations": [{"quotaId": key}, {"quotaId": quota}]}]
    fault = fault_of(answered(429, key, details=details))
    assert "Quagmire" not in str(fault)
    assert quota in str(fault)


@pytest.mark.parametrize("code", [400, 413])
def test_gemini_refuses_what_is_in_it(code: int) -> None:
    assert type(fault_of(answered(code, "INVALID_ARGUMENT"))) is RefusedInput


ANY = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(("details", "retryDelay", "violations", "quotaId", "reason")),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.text(max_size=30), ANY, st.sampled_from([400, 404, 429, 500, 503]))
def test_no_answer_breaks_the_classification(header: str, body: Any, code: int) -> None:
    response: Any = Answer({"Retry-After": header})
    fault = fault_of(ClientError(code, {"error": {**body, "code": code} if isinstance(body, dict) else body}, response))
    wait = fault.retry_after if isinstance(fault, PassingFault) else None
    assert wait is None or 0 <= wait < float("inf")


# --- Retry-After ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30", 30.0),
        (" 1.5 ", 1.5),
        ("0", 0.0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(hours=1), usegmt=True), 0.0),
        ("Fri, 02 Jan 2026 03:04:15 -0000", 10.0),
        *((odd, None) for odd in ("", "soon", "-5", "nan", "1e9", "٣", "Sun, 99 Mar 2026 12:00:30 GMT")),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert seconds_asked(value, NOW) == seconds


@given(st.text())
def test_retry_after_of_anything(value: str) -> None:
    found = retry_after({"Retry-After": value})
    assert found is None or found >= 0
