"""The Gemini embedder: Google's client against a stand-in server."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import google.auth
import numpy as np
import pytest
from google.auth import credentials as google_credentials
from google.auth import exceptions as google_auth

from benchmarks.shared.gemini_stand_in import Fault, GeminiStandIn, StandInSettings
from benchmarks.shared.word_vectors import WordVectors
from searchr1_async.errors import ConfigurationError, EmbeddingError
from searchr1_async.search import gemini
from searchr1_async.search.embedders import SentenceTransformerEmbedder
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests
from searchr1_async.search.gemini import GeminiEmbedder, make_embedder

pytestmark = pytest.mark.anyio

KEY = "AIzaSyD-secret_0123456789abcdefghijklm"
TEXTS = ["Luanda is the capital of Angola", "Zürich lies on the Limmat", "Thimphu is the capital of Bhutan"]
EXPECTED = np.stack([WordVectors().embed(text) for text in TEXTS])

Make = Callable[..., GeminiEmbedder]


class Token(google_credentials.Credentials):
    """google-auth credentials whose token never expires."""

    def __init__(self, token: str | None = KEY, failure: Exception | None = None) -> None:
        super().__init__()
        self.token = token
        self._failure = failure
        self.refreshed_in: list[threading.Thread] = []

    def refresh(self, request: Any) -> None:
        self.refreshed_in.append(threading.current_thread())
        if self._failure is not None:
            raise self._failure
        self.token = KEY


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("GEMINI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_GENAI_USE_ENTERPRISE"),
        *("GCP_VERTEXAI_PROJECT_NUMBER", "GCP_VERTEXAI_REGION", "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION"),
        "GOOGLE_APPLICATION_CREDENTIALS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p")


@pytest.fixture
async def stand_in() -> AsyncIterator[GeminiStandIn]:
    async with GeminiStandIn() as server:
        yield server


@pytest.fixture
async def make(stand_in: GeminiStandIn) -> AsyncIterator[Make]:
    """Embedders that call the stand-in, closed at the end."""
    made: list[GeminiEmbedder] = []

    def make(service: str = "developer", **options: Any) -> GeminiEmbedder:
        access: dict[str, Any] = {"api_key": KEY} if service == "developer" else {"credentials": Token()}
        made.append(GeminiEmbedder(base_url=stand_in.base_url, **access | options))
        return made[-1]

    yield make
    for embedder in made:
        await embedder.aclose()


async def refused(embedder: GeminiEmbedder, texts: list[str] = TEXTS[:1]) -> Exception:
    """The exception that embedding raises."""
    try:
        await embedder.embed_queries(texts)
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


# --- vectors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "method"),
    [("developer", "batchEmbedContents"), ("single", "embedContent")],
)
async def test_each_text_gets_its_own_vector(stand_in: GeminiStandIn, make: Make, service: str, method: str) -> None:
    embedder = make(service)
    await embedder.open()
    stand_in.forget()
    texts = TEXTS if embedder.max_texts > 1 else TEXTS[:1]
    queries, passages = await embedder.embed_queries(texts), await embedder.embed_passages(texts)
    assert queries.dtype == np.float32
    assert queries.shape == (len(texts), embedder.dimension) == (len(texts), 768)
    np.testing.assert_allclose(queries, EXPECTED[: len(texts)], rtol=1e-6)
    np.testing.assert_array_equal(passages, queries)
    assert stand_in.counts.methods == {method: 2}
    assert stand_in.counts.embedded == {
        (task, text): 1 for task in ("RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT") for text in texts
    }


async def test_a_query_finds_the_passage_with_its_rarer_words(make: Make) -> None:
    embedder = make()
    await embedder.open()
    query = await embedder.embed_queries(["What is the capital of Bhutan?"])
    similarity = (query @ (await embedder.embed_passages(TEXTS)).T)[0]
    assert similarity.argmax() == 2
    assert similarity[2] > 2 * similarity[1]


async def test_scaling_is_a_choice_and_another_index(make: Make) -> None:
    as_they_come, scaled = make(), make(normalize=True, dimension=128)
    for embedder in (as_they_come, scaled):
        await embedder.open()
    assert (np.linalg.norm(await as_they_come.embed_queries(TEXTS), axis=1) < 0.76).all()
    vectors = await scaled.embed_queries(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, 128)


def test_fingerprints_tell_vectors_that_may_not_be_mixed() -> None:
    fingerprint = GeminiEmbedder(api_key=KEY).fingerprint
    assert GeminiEmbedder(api_key="another", base_url="http://elsewhere").fingerprint == fingerprint
    assert GeminiEmbedder("models/gemini-embedding-001", credentials=Token()).fingerprint == fingerprint
    others: list[dict[str, Any]] = [{"dimension": 1_536}, {"normalize": True}, {"model": "text-embedding-005"}]
    assert len({fingerprint} | {GeminiEmbedder(**other).fingerprint for other in others}) == 4


async def test_no_texts_ask_nothing(stand_in: GeminiStandIn, make: Make) -> None:
    embedder = make()
    await embedder.open()
    stand_in.forget()
    assert (await embedder.embed_queries([])).shape == (0, 768)
    assert stand_in.counts.requests == 0


async def test_an_older_model_is_asked_by_predict(stand_in: GeminiStandIn, make: Make) -> None:
    embedder = make("single", model="text-embedding-005")
    await embedder.open()
    np.testing.assert_allclose(await embedder.embed_queries(TEXTS[:1]), EXPECTED[:1], rtol=1e-6)
    assert set(stand_in.counts.methods) == {"predict"}


# --- faults ---------------------------------------------------------------------------------------------------------------

PASSING = {
    Fault.TOO_MANY: "429",
    Fault.TOO_MANY_SILENT: "429",
    Fault.INTERNAL: "500",
    Fault.UNAVAILABLE: "503",
    Fault.UNAVAILABLE_TIMED: "503",
    Fault.BAD_GATEWAY: "502",
    Fault.RESET: "reset",
    Fault.SLOW: "timeout",
    Fault.CUT_SHORT: "reset",
    Fault.BROKEN_JSON: "malformed",
    Fault.EMPTY: "malformed",
    Fault.ONE_FEWER: "malformed",
    Fault.ONE_MORE: "malformed",
    Fault.OTHER_DIMENSION: "malformed",
    Fault.NOT_FINITE: "malformed",
}
FATAL = {
    Fault.INVALID_KEY: "GEMINI_API_KEY",
    Fault.EXPIRED_TOKEN: "GEMINI_API_KEY",
    Fault.FORBIDDEN: "SERVICE_DISABLED",
    Fault.NO_SUCH_MODEL: "check the model's name",
    Fault.WRONG_PLACE: "not offered at this place",
}


def test_every_fault_of_the_stand_in_is_tried() -> None:
    assert set(PASSING) | set(FATAL) | {Fault.BAD_REQUEST} == set(Fault)


@pytest.mark.parametrize("fault", PASSING)
async def test_a_passing_fault_is_told_and_not_tried_again(
    stand_in: GeminiStandIn, make: Make, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = make()
    await embedder.open()
    stand_in.forget()
    monkeypatch.setattr(gemini, "REQUEST_SECONDS", 0.3 if fault is Fault.SLOW else 60)
    stand_in.script.append(fault)
    error = await refused(embedder, TEXTS)
    assert isinstance(error, PassingFault)
    assert error.cause == PASSING[fault]
    slows_all = fault in (Fault.TOO_MANY, Fault.TOO_MANY_SILENT, Fault.UNAVAILABLE_TIMED)
    assert isinstance(error, TooManyRequests) == slows_all
    assert error.retry_after == (1.0 if slows_all and fault is not Fault.TOO_MANY_SILENT else None)
    assert stand_in.counts.requests == 1
    monkeypatch.setattr(gemini, "REQUEST_SECONDS", 60)
    np.testing.assert_allclose(await embedder.embed_queries(TEXTS), EXPECTED, rtol=1e-6)


@pytest.mark.parametrize("fault", FATAL)
async def test_a_fatal_fault_says_what_to_do(stand_in: GeminiStandIn, make: Make, fault: Fault) -> None:
    embedder = make()
    await embedder.open()
    stand_in.script.append(fault)
    error = await refused(embedder)
    assert isinstance(error, EmbeddingError)
    assert error.is_fatal
    assert FATAL[fault] in str(error)


@pytest.mark.parametrize("says_when", ["header", "details", "both", "nowhere"])
async def test_a_quota_tells_when_to_come_again(stand_in: GeminiStandIn, make: Make, says_when: Any) -> None:
    embedder = make()
    await embedder.open()
    stand_in.settings = StandInSettings(texts_per_minute=5, says_when=says_when)
    await embedder.embed_queries(TEXTS)
    error = await refused(embedder, TEXTS)
    assert isinstance(error, TooManyRequests)
    assert "PerMinute" in str(error)
    if says_when == "nowhere":
        assert error.retry_after is None
    else:
        assert error.retry_after is not None
        assert 5 < error.retry_after <= 13  # one text per 12 s, and one is missing


async def test_a_refused_text_is_the_requests_own_fault(stand_in: GeminiStandIn, make: Make) -> None:
    embedder = make()
    await embedder.open()
    assert isinstance(await refused(embedder, [TEXTS[0], ""]), RefusedInput)
    assert isinstance(await refused(embedder, [f"text {number}" for number in range(101)]), RefusedInput)
    assert embedder.max_texts == 100


async def test_several_texts_are_not_sent_where_a_request_takes_one(stand_in: GeminiStandIn, make: Make) -> None:
    embedder = make("single")
    await embedder.open()
    stand_in.forget()
    error = await refused(embedder, TEXTS)
    assert isinstance(error, RefusedInput)
    assert f"{len(TEXTS)} texts in a request, which takes at most 1" in str(error)
    assert stand_in.counts.requests == 0


@pytest.mark.parametrize("service", ["developer", "single"])
async def test_no_fault_holds_a_key_or_a_text(
    stand_in: GeminiStandIn, make: Make, service: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    embedder = make(service)
    await embedder.open()
    stand_in.settings = StandInSettings(echoes=True)
    texts = ["Quagmire Xylophone", "Zürich Kumquat"][: embedder.max_texts]
    told = ""
    for fault in (*PASSING, *FATAL, Fault.BAD_REQUEST):
        if fault is not Fault.SLOW and not (service == "single" and fault is Fault.ONE_MORE):
            stand_in.script.append(fault)
            error = await refused(embedder, texts)
            told += str(error) + "".join(traceback.format_exception(error))
    told += caplog.text
    for private in (KEY, KEY[:12], KEY[-12:], "Quagmire", "xylophone", "Kumquat", "rich"):
        assert private.lower() not in told.lower()
    assert "RESOURCE_EXHAUSTED" in told  # the service's codes are kept


async def test_a_service_that_is_not_there(make: Make, stand_in: GeminiStandIn) -> None:
    embedder = make()
    await embedder.open()
    await stand_in.__aexit__()
    error = await refused(embedder)
    assert isinstance(error, PassingFault)
    assert error.cause in ("reset", "unreachable")
    error = await refused(embedder)
    assert isinstance(error, PassingFault)
    assert error.cause == "unreachable"


async def test_a_cancelled_call_leaves_it_usable(stand_in: GeminiStandIn, make: Make) -> None:
    embedder = make()
    await embedder.open()
    stand_in.script.append(Fault.SLOW)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(embedder.embed_queries, TEXTS)
        await stand_in.until(requests=2)
        tasks.cancel_scope.cancel()
    np.testing.assert_allclose(await embedder.embed_queries(TEXTS), EXPECTED, rtol=1e-6)


# --- opening and access ---------------------------------------------------------------------------------------------------


async def test_a_missing_key_is_told_before_anything_is_sent(stand_in: GeminiStandIn, make: Make) -> None:
    with pytest.raises(EmbeddingError, match="GEMINI_API_KEY") as caught:
        await make(api_key=None).open()
    assert caught.value.is_fatal
    assert stand_in.counts.requests == 0


@pytest.mark.parametrize("variable", ["GEMINI_API_KEY", "GOOGLE_API_KEY"])
async def test_the_key_comes_from_the_environment(
    stand_in: GeminiStandIn, make: Make, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    stand_in.settings = StandInSettings(keys=(KEY,))
    monkeypatch.setenv(variable, f"{KEY}\n")
    await make(api_key=None).open()
    with pytest.raises(EmbeddingError, match="access denied") as caught:
        await make(api_key="explicit").open()
    assert caught.value.is_fatal


@pytest.mark.parametrize("fault", [Fault.BAD_REQUEST, Fault.NO_SUCH_MODEL, Fault.FORBIDDEN])
async def test_opening_finds_out_what_no_text_would_pass(stand_in: GeminiStandIn, make: Make, fault: Fault) -> None:
    stand_in.script.append(fault)
    embedder = make()
    with pytest.raises(EmbeddingError) as caught:
        await embedder.open()
    assert caught.value.is_fatal
    with pytest.raises(EmbeddingError, match="not open"):
        await embedder.embed_queries(TEXTS)


async def test_opening_while_the_service_is_away_can_be_tried_again(stand_in: GeminiStandIn, make: Make) -> None:
    embedder = make()
    stand_in.script.extend([Fault.UNAVAILABLE, Fault.RESET])
    for cause in ("503", "reset"):
        with pytest.raises(PassingFault) as caught:
            await embedder.open()
        assert caught.value.cause == cause
    await embedder.open()
    requests = stand_in.counts.requests
    await embedder.open()
    assert stand_in.counts.requests == requests


async def test_the_client_is_made_beside_the_event_loop(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from google import genai

    made_in: list[threading.Thread] = []

    class Watched(genai.Client):
        def __init__(self, **options: Any) -> None:
            made_in.append(threading.current_thread())
            super().__init__(**options)

    monkeypatch.setattr(genai, "Client", Watched)
    await make().open()
    assert [thread is threading.main_thread() for thread in made_in] == [False]


def test_it_opens_again_in_another_event_loop() -> None:
    embedder = GeminiEmbedder(api_key=KEY)

    async def use() -> None:
        async with GeminiStandIn() as server:
            embedder._base_url = server.base_url
            await embedder.open()
            np.testing.assert_allclose(await embedder.embed_queries(TEXTS), EXPECTED, rtol=1e-6)
            await embedder.aclose()
            await embedder.aclose()

    for _ in range(2):
        asyncio.run(use(), debug=True)


def test_arguments_that_exclude_one_another() -> None:
    with pytest.raises(ConfigurationError, match="pass one of them"):
        GeminiEmbedder(api_key=KEY, credentials=Token())
    with pytest.raises(ConfigurationError, match="gemini-embedding-001"):
        GeminiEmbedder("gemini-embedding-2")
    with pytest.raises(ConfigurationError, match="dimension"):
        GeminiEmbedder(dimension=0)


def test_limits_of_the_two_services(monkeypatch: pytest.MonkeyPatch) -> None:
    developer, single = GeminiEmbedder(), GeminiEmbedder(credentials=Token())
    assert (developer.max_texts, developer.max_requests) == (100, 16)
    assert (single.max_texts, single.max_requests) == (1, 128)
    assert GeminiEmbedder(max_requests=5).max_requests == 5
    monkeypatch.setenv("GOOGLE_GENAI_USE_VERTEXAI", "True")
    assert "Vertex" in GeminiEmbedder().name
    assert "Developer" in GeminiEmbedder(api_key=KEY).name


# --- Vertex AI ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"GCP_VERTEXAI_PROJECT_NUMBER": "1", "GCP_VERTEXAI_REGION": "r"}, "projects/1/locations/r"),
        ({"GOOGLE_CLOUD_PROJECT": "2", "GOOGLE_CLOUD_LOCATION": "s"}, "projects/2/locations/s"),
        ({"GCP_VERTEXAI_PROJECT_NUMBER": "1", "GOOGLE_CLOUD_PROJECT": "2"}, "projects/1/locations/global"),
    ],
)
async def test_project_and_region_come_from_the_environment(
    stand_in: GeminiStandIn, make: Make, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: str
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "not of Vertex AI")
    monkeypatch.setenv("GOOGLE_GENAI_USE_VERTEXAI", "1")
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stand_in.settings = StandInSettings(keys=(KEY,))
    monkeypatch.setattr(google.auth, "default", lambda scopes: (Token(), "another"))
    await make("single", credentials=None).open()
    assert stand_in.counts.places == {place: 1}


async def test_a_token_is_refreshed_once_and_beside_the_event_loop(stand_in: GeminiStandIn, make: Make) -> None:
    credentials = Token(token=None)
    embedder = make("single", credentials=credentials)
    await embedder.open()
    async with anyio.create_task_group() as tasks:
        for text in TEXTS:
            tasks.start_soon(embedder.embed_queries, [text])
    assert [thread is threading.main_thread() for thread in credentials.refreshed_in] == [False]
    assert stand_in.counts.statuses == {200: 4}


@pytest.mark.parametrize(
    ("failure", "passes"),
    [
        (google_auth.RefreshError("invalid_grant: token of secret@example.com expired"), False),
        (google_auth.RefreshError("internal failure", retryable=True), True),
        (google_auth.TransportError("no route to the token server"), True),
    ],
)
async def test_credentials_that_cannot_be_refreshed(
    stand_in: GeminiStandIn, make: Make, failure: Exception, passes: bool
) -> None:
    embedder = make("single", credentials=Token(token=None, failure=failure))
    with pytest.raises(PassingFault if passes else EmbeddingError) as caught:
        await embedder.open()
    assert caught.value.is_fatal is not passes
    assert ("gcloud auth" in str(caught.value)) is not passes
    assert "secret@example.com" not in str(caught.value)
    assert stand_in.counts.requests == 0


async def test_credentials_that_are_not_there(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("GOOGLE_GENAI_USE_VERTEXAI", "1")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(EmbeddingError, match="gcloud auth application-default login") as caught:
        await make("single", credentials=None).open()
    assert caught.value.is_fatal


async def test_credentials_without_a_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A user's file from ``gcloud auth application-default login`` names no project."""
    file = tmp_path / "user.json"
    user = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "r"}
    file.write_text(json.dumps(user))
    monkeypatch.setenv("GOOGLE_GENAI_USE_VERTEXAI", "1")
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    with pytest.raises(EmbeddingError, match="GOOGLE_CLOUD_PROJECT") as caught:
        await GeminiEmbedder().open()
    assert caught.value.is_fatal


# --- choice ---------------------------------------------------------------------------------------------------------------


def test_a_name_tells_which_embedder(tmp_path: Any) -> None:
    gemini = make_embedder("gemini")
    assert isinstance(gemini, GeminiEmbedder)
    assert make_embedder("gemini-embedding-001").fingerprint == gemini.fingerprint
    assert make_embedder(gemini) is gemini
    assert isinstance(make_embedder("all-MiniLM-L6-v2"), SentenceTransformerEmbedder)
    folder = tmp_path / "gemini-like"
    folder.mkdir()
    assert isinstance(make_embedder(folder), SentenceTransformerEmbedder)
    with pytest.raises(ConfigurationError):
        make_embedder("gemini-embedding-2")
