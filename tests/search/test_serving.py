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
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests
from searchr1_async.search.http_client import ServedEmbedder, ServedStore, look_at
from searchr1_async.search.http_server import serve_search
from searchr1_async.search.record import showing
from searchr1_async.search.stores.vector_store import Found
from searchr1_async.search.wire import (
    BadRequest,
    ServingLimits,
    parts_of,
    read_embed,
    read_query,
    read_retrieve,
    shown_name,
)

pytestmark = pytest.mark.anyio

PACING = sr.search.PacingSettings(first_pause=0.01, longest_pause=0.05, request_timeout=5.0, max_outage=20.0)
TOKEN = "a-word-between-friends"


class ExactStore:
    """Exact search over passages in memory."""

    def __init__(self, embedder: Any, passages: Sequence[Passage]) -> None:
        self.name = "compact index /home/some body/wiki.index"
        self.fingerprint = "exact-1"
        self.dimension: int | None = embedder.dimension
        self.max_queries, self.max_requests = 4, 2
        self.passages = list(passages)
        self.vectors = embedder.embed([f"{each.title} {each.text}" for each in passages])
        self.batches: list[int] = []
        self.at_once = self.most_at_once = self.counts = 0
        self.gate: anyio.Event | None = None
        self.failure: Exception | None = None

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def count(self) -> int:
        self.counts += 1
        if self.failure is not None:
            raise self.failure
        return len(self.passages)

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        self.batches.append(len(vectors))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await anyio.lowlevel.checkpoint()
            if self.gate is not None:
                await self.gate.wait()
            if self.failure is not None:
                raise self.failure
            scores = vectors @ self.vectors.T
            return tuple(
                tuple(replace(self.passages[row], score=float(line[row])) for row in np.argsort(-line)[:n_results])
                for line in scores
            )
        finally:
            self.at_once -= 1


@pytest.fixture
def store(embedder: Any, passages: list[Passage]) -> ExactStore:
    return ExactStore(embedder, passages)


@pytest.fixture
def search(embedder: Any, store: ExactStore) -> sr.Search:
    return sr.Search(embedder, store, n_results=2, pacing=PACING)


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
            _, _, plain = await ask("/retrieve", {"queries": ["capital of Chile"], **default})
            assert len(plain["result"][0]) == 2  # the search's own
            assert plain["result"][0][0] == {
                "id": "Chile/capital",
                "contents": '"Chile"\nSantiago is the capital of Chile.',
            }


class Reversed(sr.Search):
    """Shows the farthest passage first."""

    async def search(self, *arguments: Any, **options: Any) -> Found:
        return tuple(answer[::-1] for answer in await super().search(*arguments, **options))


async def test_a_search_with_a_method_of_its_own_is_what_episodes_and_clients_get(
    embedder: Any, store: ExactStore
) -> None:
    async with Reversed(embedder, store, n_results=3) as search:
        (expected,) = await search.search(["capital of Chile"])
        assert expected[-1].id == "Chile/capital"
        assert await showing(search, None, None)(["capital of Chile"]) == (expected,)
        assert len((await showing(search, 2, 1)(["capital of Chile"]))[0]) == 2
        async with serve_search(search, port=0) as address, asked(address) as ask:
            _, _, answer = await ask("/retrieve", {"queries": ["capital of Chile"], "topk": 3})
        search.search = sr.testing.DictSearch().search  # type: ignore[method-assign]
        assert [passage.id for (passage,) in await showing(search, None, None)(["Chile"])] == ["Chile"]
    shown = [each["contents"] for each in answer["result"][0]]
    assert [each.partition("\n")[2] for each in shown] == [passage.text for passage in expected]


async def test_hostile_text_spoils_only_its_own_query(search: sr.Search) -> None:
    async with serve_search(search, port=0) as address, asked(address) as ask:
        queries = ["capital\ud800 of Chile", "x" * 1_000_000, "\ud800\udc00\ud800", "", "\x00", "capital of Bhutan"]
        status, _, answer = await ask("/retrieve", {"queries": queries, "topk": 1})
        found = [[document["id"] for document in row] for row in answer["result"]]
        assert (status, found[0], found[1], found[3:]) == (200, ["Chile/capital"], [], [[], [], ["Bhutan/capital"]])
        status, _, answer = await ask("/embed", {"texts": ["lone \ud800"]})
        assert (status, answer["error"]) == (422, "refused")
        embedder = ServedEmbedder(address)
        await embedder.open()
        with pytest.raises(RefusedInput):
            await embedder.embed_queries(["lone \ud800"])
        assert (await embedder.embed_queries(["still there"])).shape == (1, embedder.dimension)
        await embedder.aclose()


async def test_a_search_over_what_is_served_finds_the_same(
    embedder: Any, search: sr.Search, store: ExactStore, passages: list[Passage]
) -> None:
    async with serve_search(search, port=0) as address:
        facts = await look_at(address)
        assert (facts.passages, facts.dimension, facts.max_queries) == (10, embedder.dimension, 4)
        far = sr.Search(ServedEmbedder(facts), ServedStore(facts), n_results=2, pacing=PACING)
        assert far.embedder.fingerprint == embedder.fingerprint  # before anything is open
        async with far:
            queries = [f"{passage.title} {passage.text}" for passage in passages]
            assert await far.search(queries) == await search.search(queries)
        assert store.most_at_once <= store.max_requests
        assert max(store.batches) <= store.max_queries


async def test_larger_requests_than_the_services_take_are_split(make_embedder: Any, passages: list[Passage]) -> None:
    embedder = make_embedder(max_texts=3)
    store = ExactStore(embedder, passages)
    async with serve_search(sr.Search(embedder, store), port=0) as address, asked(address) as ask:
        async with aiohttp.ClientSession() as session:
            texts = [passage.text for passage in passages]
            async with session.post(f"{address}/embed", json={"texts": texts, "kind": "passage"}) as answer:
                body = await answer.read()
        assert [len(batch) for batch in embedder.passage_batches] == [3, 3, 3, 1]
        assert np.array_equal(np.frombuffer(body, "<f4").reshape(10, -1), embedder.embed(texts))
        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(ask, f"/query?dimension={embedder.dimension}&n_results=1", body)
        assert sorted(store.batches) == [2] * 6 + [4] * 12
        assert store.most_at_once == store.max_requests


async def test_health_says_what_is_served_and_nothing_of_folders(search: sr.Search, store: ExactStore) -> None:
    async with serve_search(search, port=0, token=TOKEN) as address, asked(address) as ask:
        answers = [await ask("/health") for _ in range(20)]
        assert {status for status, _, _ in answers} == {200}
        health = answers[-1][2]
        assert store.counts <= 2
        assert (health["service"], health["store"], health["passages"]) == (
            "searchr1_async search",
            "compact index",
            10,
        )
        assert health["embedder_fingerprint"] == search.embedder.fingerprint
        assert health["limits"]["requests"] == 64
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
        for path, body in (("/health", None), ("/embed", {"texts": ["x"]}), ("/retrieve", {"queries": ["x"]})):
            status, headers, answer = await ask(path, body)
            assert (status, answer["error"]) == (503, "opening")
            assert "Retry-After" not in headers  # not up: a client counts that as an outage
        go_on.set()
        await served.wait()
        store.failure = PassingFault("in /home/some body: no answer", cause="reset")
        status, _, answer = await ask("/health")
        assert (status, answer["error"]) == (503, "store")
        status, _, answer = await ask(
            f"/query?dimension={embedder.dimension}&n_results=1", bytes(4 * embedder.dimension)
        )
        assert (status, answer["error"]) == (503, "unavailable")
        assert "some body" not in json.dumps(answer)
        done.set()


async def test_a_token_is_asked_for_and_never_said(search: sr.Search, caplog: pytest.LogCaptureFixture) -> None:
    async with serve_search(search, port=0, token=TOKEN) as address:
        for wrong in (None, "another-word", TOKEN[:-1], TOKEN + "s"):
            async with asked(address, wrong) as ask:
                status, _, answer = await ask("/retrieve", {"queries": ["x"]})
                assert (status, answer["error"]) == (401, "token")
            with pytest.raises(sr.errors.StoreError, match="token") as refused:
                await look_at(address, wrong)
            assert refused.value.is_fatal
            assert TOKEN not in str(refused.value)
        facts = await look_at(address, TOKEN)
        async with sr.Search(ServedEmbedder(facts, TOKEN), ServedStore(facts, TOKEN)) as far:
            assert (await far.search(["capital of Chile"]))[0][0].id == "Chile/capital"
        unauthorised = ServedStore(replace(facts, is_authorized=True))
        await unauthorised._connection.open()
        with pytest.raises(sr.errors.StoreError) as refused:
            await unauthorised.query(np.ones((1, facts.dimension), np.float32), 1)
        assert refused.value.is_fatal
        await unauthorised.aclose()
    assert TOKEN not in caplog.text
    for broken in ("", "two words", "schlüssel"):
        with pytest.raises(sr.errors.ConfigurationError):
            ServedStore("http://127.0.0.1:1", broken)
        with pytest.raises(sr.errors.ConfigurationError):
            async with serve_search(search, port=0, token=broken):
                pass


async def test_beyond_the_requests_at_once_there_is_429_and_a_search_waits(
    search: sr.Search, store: ExactStore
) -> None:
    limits = ServingLimits(requests=2)
    async with serve_search(search, port=0, limits=limits) as address, asked(address) as ask:
        facts = await look_at(address)
        client = ServedStore(facts)
        await client.open()
        vectors = np.ones((1, facts.dimension), np.float32)
        store.gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.query, vectors, 1)
            tasks.start_soon(client.query, vectors, 1)
            while store.at_once < 2:
                await anyio.lowlevel.checkpoint()
            status, headers, answer = await ask("/retrieve", {"queries": ["capital of Chile"]})
            assert (status, answer["error"], headers["Retry-After"]) == (429, "busy", "1")
            with pytest.raises(TooManyRequests) as pushed_back:
                await client.query(vectors, 1)
            assert pushed_back.value.retry_after == 1.0
            assert (await ask("/health"))[0] == 200
            store.gate.set()
        assert len(await client.query(vectors, 1)) == 1
        await client.aclose()


async def test_a_request_has_its_time_and_one_that_is_cancelled_leaves_nothing(
    search: sr.Search, store: ExactStore
) -> None:
    async with serve_search(search, port=0, limits=ServingLimits(seconds=0.2, requests=2)) as address:
        client = ServedStore(address)
        await client.open()
        vectors = np.ones((1, client.dimension or 0), np.float32)
        store.gate = anyio.Event()
        with pytest.raises(PassingFault) as late:
            await client.query(vectors, 1)
        assert late.value.cause == "504"
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(client.query, vectors, 1)
            while store.at_once < 2:
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(5):
            while store.at_once:  # the service notices the disconnect before their timeout
                await anyio.lowlevel.checkpoint()
        store.gate.set()
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(client.query, vectors, 1)
        await client.aclose()


async def test_a_service_that_stops_finishes_what_it_has(
    search: sr.Search, store: ExactStore, free_tcp_port: int
) -> None:
    answers: list[Found] = []
    client = ServedStore(f"http://127.0.0.1:{free_tcp_port}")

    async def ask() -> None:
        answers.append(await client.query(np.ones((1, client.dimension or 0), np.float32), 1))

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
    assert gone.value.cause == "refused"
    await client.aclose()


async def test_a_search_waits_for_a_service_that_stops_amid_a_request(
    search: sr.Search, store: ExactStore, free_tcp_port: int
) -> None:
    limits = ServingLimits(grace=0.05)
    found: list[Found] = []
    answered = anyio.Event()

    async def ask(far: sr.Search) -> None:
        found.append(await far.search(["capital of Chile"]))
        answered.set()

    async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
        async with serve_search(search, port=free_tcp_port, limits=limits) as address:
            facts = await look_at(address)
            far = await stack.enter_async_context(
                sr.Search(ServedEmbedder(facts), ServedStore(facts), n_results=2, pacing=PACING)
            )
            store.gate = anyio.Event()
            tasks.start_soon(ask, far)
            while not store.at_once:
                await anyio.lowlevel.checkpoint()
        assert not found
        store.gate = None
        async with serve_search(search, port=free_tcp_port, limits=limits):
            await answered.wait()
            assert far.statistics.querying.faults
    assert found[0][0][0].id == "Chile/capital"


async def test_another_index_or_embedder_there_is_noticed(search: sr.Search, store: ExactStore, embedder: Any) -> None:
    async with serve_search(search, port=0) as address:
        facts = await look_at(address)
        client, far_embedder = ServedStore(facts), ServedEmbedder(facts)
        await client.open()
        await far_embedder.open()
        store.fingerprint = "exact-2"
        await client.query(np.ones((1, facts.dimension), np.float32), 1)
        assert client.fingerprint == "exact-2"
        with pytest.raises(sr.errors.StoreError, match="another embedder") as wrong:
            await client.query(np.ones((1, 7), np.float32), 1)
        assert wrong.value.is_fatal
        embedder.fingerprint = "another"
        with pytest.raises(sr.errors.EmbeddingError, match="another model") as changed:
            await far_embedder.embed_queries(["x"])
        assert changed.value.is_fatal
        again = ServedEmbedder(facts)
        with pytest.raises(sr.errors.EmbeddingError, match="another model"):
            await again.open()
        await far_embedder.aclose()
        await client.aclose()


async def test_what_is_no_served_search_is_said_to_be_none() -> None:
    from aiohttp import web

    async def something(request: web.Request) -> web.Response:
        return web.json_response({"service": "of weather"})

    application = web.Application()
    application.router.add_get("/health", something)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    for url in (address, f"{address}/elsewhere"):
        with pytest.raises(sr.errors.StoreError, match="is not `python -m searchr1_async serve`") as other:
            await look_at(url)
        assert other.value.is_fatal
    await runner.cleanup()
    with pytest.raises(sr.errors.StoreError, match="does not answer"):
        await look_at(address, deadline=0.15)
    for broken in ("127.0.0.1:80", "http://", "ftp://host", "http://user:secret@host"):
        with pytest.raises(sr.errors.ConfigurationError) as refused:
            ServedStore(broken)
        assert "secret" not in str(refused.value)


async def test_a_port_that_is_taken_is_said_to_be(search: sr.Search) -> None:
    async with serve_search(search, port=0) as address:
        with pytest.raises(sr.errors.ConfigurationError, match="cannot listen on"):
            async with serve_search(search, port=int(address.rsplit(":", 1)[1])):
                pass
    assert not search.is_open


REFUSED: list[tuple[str, Any, int, str]] = [
    ("/embed", b"{", 400, "malformed"),
    ("/embed", b"[" * 100_000, 400, "malformed"),
    ("/embed", {"texts": "one"}, 422, "malformed"),
    ("/embed", {"texts": ["a"], "kind": "other"}, 422, "malformed"),
    ("/embed", {"texts": ["a"] * 9}, 413, "too_many"),
    ("/embed", {"texts": ["a" * 200_000]}, 413, "too_large"),
    ("/query?dimension=0&n_results=1", b"", 422, "malformed"),
    ("/query?dimension=2&n_results=1", bytes(7), 422, "malformed"),
    ("/query?dimension=2&n_results=1000", bytes(8), 422, "malformed"),
    ("/query?dimension=2&n_results=1", bytes(8), 422, "dimension"),
    ("/query?dimension=1&n_results=1", b"\x00\x00\xc0\x7f", 422, "refused"),
    ("/query?dimension=1&n_results=1", bytes(4 * 9), 413, "too_many"),
    ("/retrieve", {"queries": ["a"], "topk": 101}, 422, "malformed"),
    ("/retrieve", {"queries": ["a"], "topk": True}, 422, "malformed"),
    ("/retrieve", {"queries": [1]}, 422, "malformed"),
    ("/retrieve", {"queries": ["a"], "return_scores": "no"}, 422, "malformed"),
    ("/retrieve", [], 400, "malformed"),
    ("/elsewhere", {}, 404, "unknown"),
    ("/embed", None, 405, "unknown"),
]


async def test_what_is_refused_is_told_why(search: sr.Search) -> None:
    limits = ServingLimits(body_bytes=150_000, texts=8, vectors=8)
    async with serve_search(search, port=0, limits=limits) as address, asked(address) as ask:
        for path, body, status, kind in REFUSED:
            answered, _, answer = await ask(path, body)
            assert (path, answered, answer["error"]) == (path, status, kind)
            assert answer["message"]
        assert (await ask("/retrieve", {"queries": ["capital of Chile"]}))[0] == 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["lone \ud800", "\udc00\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(["texts", "kind", "queries", "topk", "return_scores"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=64) | (JSON | st.dictionaries(FIELDS, JSON, max_size=4)).map(lambda v: json.dumps(v).encode())
)
def test_any_body_is_read_or_refused(body: bytes) -> None:
    limits = ServingLimits(texts=2, vectors=2, queries=2)
    for read in (read_embed, read_retrieve, lambda body, limits: read_query(body, "2", "3", limits)):
        try:
            found = read(body, limits)
        except BadRequest as refused:
            assert refused.status in (400, 413, 422)  # noqa: PT017
        else:
            assert found is not None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=12), st.integers(1, 5), st.none() | st.integers(1, 20))
def test_parts_hold_every_text_once_and_keep_to_what_is_taken(texts: list[str], most: int, tokens: int | None) -> None:
    parts = [list(part) for part in parts_of(texts, most, tokens)]
    assert [text for part in parts for text in part] == texts
    for part in parts:
        assert 1 <= len(part) <= most
        weight = sum(len(text.encode()) // 3 + 1 for text in part)
        assert tokens is None or len(part) == 1 or weight <= tokens


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("compact index /data/wiki 18", "compact index"),
        ("Chroma collection 'wiki' in /data/my index", "Chroma collection 'wiki'"),
        ("Chroma collection 'wiki' at host:8000 (tenant 'a')", "Chroma collection 'wiki'"),
        ("the search served at http://host:8200", "the search served"),
        ("intfloat/e5-base-v2", "intfloat/e5-base-v2"),
        ("/models/my e5", "my e5"),
        ("compact index C:\\data\\wiki", "compact index"),
    ],
)
def test_a_name_is_shown_without_its_place(name: str, shown: str) -> None:
    assert shown_name(name) == shown
