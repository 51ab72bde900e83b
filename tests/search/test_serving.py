"""A served search over real sockets: by its own client, the original's, and hostile ones."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import anyio
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import searchr1_async as sr
from searchr1_async.episodes.types import Passage
from searchr1_async.search import http_server
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import PassingFault, TooManyRequests
from searchr1_async.search.http_client import ServedSearch
from searchr1_async.search.http_server import serve_search
from searchr1_async.search.stores.vector_store import Found

pytestmark = pytest.mark.anyio

PACING = sr.search.PacingSettings(first_pause=0.01, longest_pause=0.05, request_timeout=5.0, max_outage=20.0)
TOKEN = "a-word-between-friends"
CHILE = ["capital of Chile"]


class ExactStore:
    """Exact search over passages in memory."""

    def __init__(self, embedder: Any, passages: Sequence[Passage]) -> None:
        self.name = "compact index /home/some body/wiki.index"
        self.fingerprint = "exact-1"
        self.dimension: int | None = embedder.dimension
        self.max_queries, self.max_requests = 4, 2
        self.passages = list(passages)
        self.vectors = embedder.embed([f"{each.title} {each.text}" for each in passages])
        self.at_once = 0
        self.gate: anyio.Event | None = None
        self.failure: Exception | None = None

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def count(self) -> int:
        if self.failure is not None:
            raise self.failure
        return len(self.passages)

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        self.at_once += 1
        try:
            await anyio.lowlevel.checkpoint()
            if self.gate is not None:
                await self.gate.wait()
            if self.failure is not None:
                raise self.failure
            scores = vectors @ self.vectors.T
            return tuple(
                tuple(replace(self.passages[row], score=line[row]) for row in np.argsort(-line)[:n_results])
                for line in scores
            )
        finally:
            self.at_once -= 1


@pytest.fixture
def store(embedder: Any, passages: list[Passage]) -> ExactStore:
    return ExactStore(embedder, passages)


@pytest.fixture
def search(embedder: Any, store: ExactStore) -> sr.Search:
    return sr.Search(embedder, store, n_results=2, pacing=PACING, cache_entries=0)


@asynccontextmanager
async def asked(address: str, token: str | None = None) -> AsyncIterator[Any]:
    """A plain HTTP client: ``await ask(path, json or bytes)`` returns status, headers and the answer's JSON."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(headers=headers) as session:

        async def ask(path: str, body: Any = None) -> tuple[int, Any, Any]:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            async with session.request("GET" if body is None else "POST", address + path, data=data) as answer:
                return answer.status, answer.headers, json.loads(await answer.read())

        yield ask


def passages_to_string(retrieval_result: list[Any]) -> str:
    """How the original's clients format an answer."""
    lines = []
    for number, item in enumerate(retrieval_result, start=1):
        title, *text = item["document"]["contents"].split("\n")
        lines.append(f"Doc {number}(Title: {title}) {chr(10).join(text)}\n")
    return "".join(lines)


async def test_a_passage_that_is_no_unicode_is_served(search: sr.Search, store: ExactStore) -> None:
    store.passages = [replace(each, text=f"{each.text} \ud800") for each in store.passages]
    async with serve_search(search, port=0) as address, asked(address) as ask:
        status, _, answer = await ask("/retrieve", {"queries": CHILE})
        assert (status, answer["result"][0][0]["contents"][-2:]) == (200, " ?")
        async with await sr.Search.open(address) as far:
            assert (await far.search(CHILE))[0][0].text.endswith(" ?")


async def test_the_original_clients_find_what_they_know(search: sr.Search) -> None:
    async with serve_search(search, port=0) as address, asked(address) as ask:
        status, _, answer = await ask(
            "/retrieve",
            {"queries": ["capital of Chile", " ?! ", "highest point in Egypt"], "topk": 1, "return_scores": True},
        )
        assert status == 200
        chile, nothing, egypt = answer["result"]
        assert passages_to_string(chile) == 'Doc 1(Title: "Chile") Santiago is the capital of Chile.\n'
        assert passages_to_string(egypt) == 'Doc 1(Title: "Egypt") Egypt has its highest point at Jabal Katrinah.\n'
        assert nothing == []
        assert set(chile[0]) == {"document", "score"}
        assert isinstance(chile[0]["score"], float)
        for default in ({}, {"topk": None}, {"topk": 0}):
            _, _, plain = await ask("/retrieve", {"queries": CHILE, **default})
            assert len(plain["result"][0]) == 2  # the search's own
            assert plain["result"][0][0] == {
                "id": "Chile/capital",
                "contents": '"Chile"\nSantiago is the capital of Chile.',
            }


async def test_hostile_text_spoils_only_its_own_query(search: sr.Search) -> None:
    async with serve_search(search, port=0) as address, asked(address) as ask:
        queries = ["x" * 1_000_000, "", "\x00", "capital of Bhutan"]
        status, _, answer = await ask("/retrieve", {"queries": queries, "topk": 1})
        found = [[document["id"] for document in row] for row in answer["result"]]
        assert (status, found) == (200, [[], [], [], ["Bhutan/capital"]])


async def test_a_search_over_what_is_served_finds_the_same(
    embedder: Any, search: sr.Search, passages: list[Passage]
) -> None:
    async with serve_search(search, port=0) as address:
        far = await sr.Search.open(address, n_results=2, max_passage_words=3, pacing=PACING)
        # Known before it is open.
        assert far.embedder is None
        assert far.embedder_name == f"hashing at {address}"
        assert far.embedder_fingerprint == embedder.fingerprint
        async with far:
            queries = [f"{passage.title} {passage.text}" for passage in passages]
            assert await far.search(queries, max_passage_words=0) == await search.search(queries)
            assert await far.search(queries) == await search.search(queries, max_passage_words=3)
            assert far.statistics.embedding.requests == 0
            assert far.statistics.querying.texts == 2 * len(queries)
        with pytest.raises(sr.errors.ConfigurationError, match="embeds queries itself"):
            await sr.Search.open(address, embedder=embedder)


async def test_health_says_what_is_served_and_nothing_of_folders(search: sr.Search) -> None:
    search.embedder.name = "/home/some body/e5"  # type: ignore[union-attr]
    async with serve_search(search, port=0, token=TOKEN) as address, asked(address) as ask:
        status, _, health = await ask("/health")
        assert (status, health["passages"], health["embedder"], health["requests"]) == (200, 10, "e5", 64)
        assert health["embedder_fingerprint"] == search.embedder_fingerprint
        assert not health["is_authorized"]
        assert "some body" not in json.dumps(health)
        assert TOKEN not in json.dumps(health)


async def test_health_is_503_while_the_search_opens_and_while_its_store_is_down(
    embedder: Any, search: sr.Search, store: ExactStore, free_tcp_port: int
) -> None:
    begun, go_on = anyio.Event(), anyio.Event()

    async def open_slowly() -> None:
        begun.set()
        await go_on.wait()

    embedder.open = open_slowly
    served, done = anyio.Event(), anyio.Event()

    async def serve() -> None:
        async with serve_search(search, port=free_tcp_port):
            served.set()
            await done.wait()

    async with anyio.create_task_group() as tasks, asked(f"http://127.0.0.1:{free_tcp_port}") as ask:
        tasks.start_soon(serve)
        await begun.wait()
        for path, body in (("/health", None), ("/search", {"queries": ["x"]}), ("/retrieve", {"queries": ["x"]})):
            status, headers, answer = await ask(path, body)
            assert (status, answer["error"]) == (503, "opening")
            assert "Retry-After" not in headers  # not up: a client counts that as an outage
        go_on.set()
        await served.wait()
        store.failure = sr.errors.StoreError("in /home/some body: gone")
        status, _, answer = await ask("/health")
        assert (status, answer["error"]) == (503, "store")
        status, _, answer = await ask("/search", {"queries": CHILE})
        assert (status, answer["error"]) == (502, "failed")
        assert "some body" not in json.dumps(answer)
        done.set()


async def test_a_token_is_asked_for_and_never_said(search: sr.Search, caplog: pytest.LogCaptureFixture) -> None:
    async with serve_search(search, port=0, token=TOKEN) as address:
        for wrong in (None, "another-word", TOKEN[:-1], TOKEN + "s"):
            async with asked(address, wrong) as ask:
                status, _, answer = await ask("/retrieve", {"queries": ["x"]})
                assert (status, answer["error"]) == (401, "token")
            with pytest.raises(sr.errors.StoreError, match="token") as refused:
                await sr.Search.open(address, token=wrong)
            assert refused.value.is_fatal
            assert TOKEN not in str(refused.value)
        async with await sr.Search.open(address, token=TOKEN) as far:
            assert (await far.search(CHILE))[0][0].id == "Chile/capital"
    assert TOKEN not in caplog.text
    for broken in ("", "two words", "schlüssel"):
        with pytest.raises(sr.errors.ConfigurationError):
            await sr.Search.open("http://127.0.0.1:1", token=broken)
        with pytest.raises(sr.errors.ConfigurationError):
            async with serve_search(search, port=0, token=broken):
                pass


async def opened(address: str) -> ServedSearch:
    client = ServedSearch(address)
    await client.open()
    return client


async def search_until_refused(client: ServedSearch) -> None:
    """While earlier requests may be on their way."""
    while True:
        with anyio.move_on_after(0.05):
            await client.search(CHILE, 1)


async def test_beyond_the_requests_at_once_there_is_429_and_a_search_waits(
    search: sr.Search, store: ExactStore
) -> None:
    async with serve_search(search, port=0, max_requests=2) as address, asked(address) as ask:
        client = await opened(address)
        store.gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.search, CHILE, 1)
            tasks.start_soon(client.search, ["highest point in Egypt"], 1)
            while not store.at_once:
                await anyio.lowlevel.checkpoint()
            with pytest.raises(TooManyRequests) as pushed_back:
                await search_until_refused(client)
            assert pushed_back.value.retry_after == 1.0
            status, headers, answer = await ask("/retrieve", {"queries": CHILE})
            assert (status, answer["error"], headers["Retry-After"]) == (429, "busy", "1")
            assert (await ask("/health"))[0] == 200
            store.gate.set()
        assert len(await client.search(CHILE, 1)) == 1
        await client.aclose()
        with pytest.raises(sr.errors.ConfigurationError, match="max_requests"):
            async with serve_search(search, port=0, max_requests=0):
                pass


async def test_a_request_has_its_time_and_one_that_is_cancelled_leaves_nothing(
    search: sr.Search, store: ExactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "REQUEST_SECONDS", 0.2)
    async with serve_search(search, port=0, max_requests=2) as address:
        client = await opened(address)
        store.gate = anyio.Event()
        with pytest.raises(PassingFault) as late:
            await client.search(CHILE, 1)
        assert late.value.cause == "504"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.search, CHILE, 1)
            while not store.at_once:
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(5):
            while store.at_once:  # the service notices the disconnect before their timeout
                await anyio.lowlevel.checkpoint()
        store.gate.set()
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(client.search, CHILE, 1)
        await client.aclose()


async def test_a_service_that_stops_finishes_what_it_has(
    search: sr.Search, store: ExactStore, free_tcp_port: int
) -> None:
    answers: list[Found] = []
    client = ServedSearch(f"http://127.0.0.1:{free_tcp_port}")

    async def ask() -> None:
        answers.append(await client.search(CHILE, 1))

    async def go_on_once_nobody_listens(gate: anyio.Event) -> None:
        try:
            while True:
                await (await anyio.connect_tcp("127.0.0.1", free_tcp_port)).aclose()
        except OSError:
            gate.set()

    async with anyio.create_task_group() as tasks, serve_search(search, port=free_tcp_port):
        await client.open()
        store.gate = anyio.Event()
        tasks.start_soon(ask)
        while not store.at_once:
            await anyio.lowlevel.checkpoint()
        tasks.start_soon(go_on_once_nobody_listens, store.gate)
    assert len(answers) == 1
    with pytest.raises(PassingFault) as gone:
        await client.count()
    assert gone.value.cause == "unreachable"
    await client.aclose()


async def test_a_search_waits_for_a_service_that_stops_amid_a_request(
    search: sr.Search, store: ExactStore, free_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "GRACE_SECONDS", 0.05)
    found: list[Found] = []
    answered = anyio.Event()

    async def ask(far: sr.Search) -> None:
        found.append(await far.search(CHILE))
        answered.set()

    async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
        async with serve_search(search, port=free_tcp_port) as address:
            far = await stack.enter_async_context(await sr.Search.open(address, n_results=2, pacing=PACING))
            store.gate = anyio.Event()
            tasks.start_soon(ask, far)
            while not store.at_once:
                await anyio.lowlevel.checkpoint()
        assert not found
        store.gate = None
        async with serve_search(search, port=free_tcp_port):
            await answered.wait()
            assert far.statistics.querying.faults
    assert found[0][0][0].id == "Chile/capital"


async def test_another_index_or_embedder_there_is_noticed(search: sr.Search, store: ExactStore, embedder: Any) -> None:
    async with serve_search(search, port=0) as address:
        client = await opened(address)
        store.fingerprint = "exact-2"
        await client.search(CHILE, 1)
        assert client.fingerprint == "exact-2"
        await client.aclose()
        embedder.fingerprint = "another"
        with pytest.raises(sr.errors.StoreError, match="another model") as changed:
            await client.open()
        assert changed.value.is_fatal


@pytest.mark.parametrize(
    ("health", "says"),
    [
        ({"service": "of weather"}, "is not `searchr1 serve`"),
        ({"protocol": 2, "passages": "many"}, "is not `searchr1 serve`"),
        ([], "is not `searchr1 serve`"),
    ],
)
async def test_what_is_no_served_search_is_said_to_be_none(health: Any, says: str) -> None:
    from aiohttp import web

    async def something(request: web.Request) -> web.Response:
        return web.json_response(health)

    application = web.Application()
    application.router.add_get("/health", something)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    for url, words in ((address, says), (f"{address}/elsewhere", "is not `searchr1 serve`")):
        with pytest.raises(sr.errors.StoreError, match=words) as other:
            await sr.Search.open(url)
        assert other.value.is_fatal
    await runner.cleanup()


@pytest.mark.parametrize("address", ["127.0.0.1:80", "http://", "ftp://host", "http://user:secret@host"])
def test_an_address_that_cannot_be(address: str) -> None:
    with pytest.raises(sr.errors.ConfigurationError) as refused:
        ServedSearch(address)
    assert "secret" not in str(refused.value)


async def test_a_port_that_is_taken_is_said_to_be(search: sr.Search) -> None:
    async with serve_search(search, port=0) as address:
        with pytest.raises(sr.errors.ConfigurationError, match="cannot listen on"):
            async with serve_search(search, port=int(address.rsplit(":", 1)[1])):
                pass
    assert not search.is_open


REFUSED: list[tuple[str, Any, int, str]] = [
    ("/search", b"{", 400, "malformed"),
    ("/search", b"[" * 100_000, 422, "malformed"),
    ("/search", {"queries": "one"}, 422, "malformed"),
    ("/search", {"queries": ["a"] * 4_097}, 422, "malformed"),
    ("/search", {"queries": ["a"], "n_results": 0}, 422, "malformed"),
    ("/search", {"queries": ["a" * 200_000]}, 413, "too_large"),
    ("/retrieve", {"queries": ["a"], "topk": 101}, 422, "malformed"),
    ("/retrieve", {"queries": ["a"], "topk": True}, 422, "malformed"),
    ("/retrieve", {"queries": [1]}, 422, "malformed"),
    ("/retrieve", {"queries": ["a"], "return_scores": "no"}, 422, "malformed"),
    ("/retrieve", [], 422, "malformed"),
    ("/elsewhere", {}, 404, "unknown"),
    ("/search", None, 405, "unknown"),
]


async def test_what_is_refused_is_told_why(search: sr.Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MAX_BYTES", 150_000)
    async with serve_search(search, port=0) as address, asked(address) as ask:
        for path, body, status, kind in REFUSED:
            answered, _, answer = await ask(path, body)
            assert (path, answered, answer["error"]) == (path, status, kind)
            assert answer["message"]
        assert (await ask("/retrieve", {"queries": CHILE}))[0] == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("lone \ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(["queries", "n_results", "topk", "return_scores"])
BODIES = st.binary(max_size=64) | (JSON | st.dictionaries(FIELDS, JSON, max_size=4)).map(
    lambda value: json.dumps(value).encode()
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(BODIES, min_size=5, max_size=5))
async def test_any_body_is_answered_or_refused(search: sr.Search, bodies: list[bytes]) -> None:
    async with serve_search(search, port=0) as address, asked(address) as ask:
        for path in ("/search", "/retrieve"):
            for body in bodies:
                assert (await ask(path, body))[0] in (200, 400, 422)
