"""Which fault an answer or an exception of Chroma is: a pure table."""

from __future__ import annotations

import json
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp.client_reqrep import ConnectionKey
from chromadb import errors as chroma_errors
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.errors import SearchError, StoreError
from searchr1_async.search.faults import (
    MissingCollection,
    PassingFault,
    RefusedInput,
    TooManyRequests,
    fault_of_answer,
    fault_of_embedded,
    fault_of_exception,
)
from searchr1_async.search.faults import chroma_retry_after as retry_after

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KEY = ConnectionKey("host", 443, True, True, None, None, None)


def chroma_says(kind: str, message: str) -> bytes:
    return json.dumps({"error": kind, "message": message}).encode()


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "cause", "wait"),
    [
        (429, {}, b"", TooManyRequests, "429", None),
        (429, {"Retry-After": "7"}, chroma_says("RateLimitError", "slow"), TooManyRequests, "429", 7),
        (503, {"retry-after": "0.5"}, b"<html>", TooManyRequests, "503", 0.5),
        (503, {}, b"<html>", PassingFault, "503", None),
        (500, {}, chroma_says("InternalError", "HNSW"), PassingFault, "500", None),
        (502, {}, b"", PassingFault, "502", None),
        (504, {}, b"", PassingFault, "504", None),
        (524, {}, b"", PassingFault, "524", None),
        (408, {}, b"", PassingFault, "408", None),
        (409, {}, chroma_says("UniqueConstraintError", "exists"), PassingFault, "409", None),
    ],
)
def test_an_answer_that_may_be_another_one_next_time(
    status: int, headers: dict[str, str], body: bytes, kind: type[PassingFault], cause: str, wait: float | None
) -> None:
    fault = fault_of_answer("the store", status, headers, body)
    assert type(fault) is kind
    assert isinstance(fault, PassingFault)
    assert (fault.cause, fault.retry_after) == (cause, wait)


@pytest.mark.parametrize(
    ("status", "body", "kind", "is_fatal", "says"),
    [
        (401, chroma_says("AuthorizationError", "no"), StoreError, True, "CHROMA_API_KEY"),
        (403, b"<html>", StoreError, True, "set token"),
        (404, chroma_says("NotFoundError", "Collection [x] does not exist"), MissingCollection, True, "does not exist"),
        (404, b"", StoreError, True, "check host and port"),
        (404, b'{"detail":"Not Found"}', StoreError, True, "check host and port"),
        (307, b"", StoreError, True, "redirects"),
        (
            400,
            chroma_says("InvalidArgumentError", "Collection expecting embedding with dimension of 3, got 2"),
            StoreError,
            True,
            "another embedder .dimension 3, got 2.",
        ),
        (400, chroma_says("QuotaError", "over 300 records"), RefusedInput, False, "over 300 records"),
        (413, b"", RefusedInput, False, "413"),
        (422, b"", RefusedInput, False, "422"),
        (402, b"", StoreError, True, "402"),
        (501, b"", StoreError, True, "501"),
    ],
)
def test_an_answer_that_stays(status: int, body: bytes, kind: type[SearchError], is_fatal: bool, says: str) -> None:
    fault = fault_of_answer("the store", status, {}, body)
    assert type(fault) is kind
    assert fault.is_fatal is is_fatal
    with pytest.raises(kind, match=says):
        raise fault


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (aiohttp.ClientConnectorError(KEY, ConnectionRefusedError(111, "refused")), "refused"),
        (aiohttp.ClientConnectorDNSError(KEY, OSError(-2, "unknown")), "name"),
        (aiohttp.ServerDisconnectedError(), "reset"),
        (aiohttp.ClientOSError(104, "reset"), "reset"),
        (ConnectionResetError(), "reset"),
        (aiohttp.ClientPayloadError("cut"), "reset"),
        (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLEOFError(8, "EOF")), "reset"),
        (aiohttp.ConnectionTimeoutError(), "timeout"),
        (aiohttp.SocketTimeoutError(), "timeout"),
        (TimeoutError(), "timeout"),
        (orjson.JSONDecodeError("cut", "{", 1), "malformed"),
        (aiohttp.ClientResponseError(None, ()), "malformed"),  # type: ignore[arg-type]
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_a_transport_that_broke(error: Exception, cause: str) -> None:
    fault = fault_of_exception("the store", error)
    assert isinstance(fault, PassingFault)
    assert fault.cause == cause
    assert not fault.is_fatal


@pytest.mark.parametrize(
    ("error", "is_fatal"),
    [
        (aiohttp.ClientConnectorCertificateError(KEY, ssl.SSLCertVerificationError("self-signed")), True),
        (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError(1, "WRONG_VERSION_NUMBER")), True),
        (aiohttp.InvalidURL("http://"), True),
        (RuntimeError("a bug that quotes a passage"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_transport_that_will_not_mend(error: Exception, is_fatal: bool) -> None:
    fault = fault_of_exception("the store", error)
    assert type(fault) is StoreError
    assert fault.is_fatal is is_fatal
    assert "quotes a passage" not in str(fault)


def test_what_is_a_fault_already_stays_one() -> None:
    fault = PassingFault("x", cause="reset")
    assert fault_of_exception("the store", fault) is fault
    assert fault_of_embedded("the store", fault) is fault


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
    assert "'x'" not in str(fault)


@given(
    st.text(min_size=4).map(lambda text: f"LUANDA{text}LUANDA"),
    st.sampled_from([400, 422, 429, 500, 503]),
)
def test_what_chroma_quotes_of_a_request_is_not_told(text: str, status: int) -> None:
    quoted = json.dumps(text)
    body = chroma_says("ChromaError", f"documents[0]: invalid type: string {quoted}, expected a sequence at column 39")
    said = str(fault_of_answer("the store", status, {}, body))
    assert "LUANDA" not in said
    assert "expected a sequence" in said


JSON = st.recursive(
    st.none() | st.text() | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["error", "message", "detail"]), inner),
)


@settings(max_examples=50)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()), st.integers(300, 599))
def test_any_body_of_any_status_is_some_fault(body: bytes, status: int) -> None:
    fault = fault_of_answer("the store", status, {}, body)
    assert str(fault).startswith("the store")
    assert len(str(fault)) < 600


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30", 30.0),
        (" 1.5 ", 1.5),
        ("0", 0.0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(hours=1), usegmt=True), 0.0),
        ("Fri, 02 Jan 2026 03:04:15 -0000", 10.0),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("nan", None),
        ("1e9", None),
        ("٣", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after({"ReTrY-AfTeR": value, "Other": "1"}, NOW) == seconds


@given(st.text())
def test_retry_after_of_anything(value: str) -> None:
    found: Any = retry_after({"Retry-After": value}, NOW)
    assert found is None or found >= 0
