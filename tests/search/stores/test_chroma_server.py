"""The store of a Chroma server: what it sends, what it makes of every answer, and a real server that dies and returns."""

from __future__ import annotations

import asyncio
import base64
import gc
import uuid
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import chromadb
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from chromadb.config import Settings

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError, SearchError, StoreError
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests
from searchr1_async.search.stores.chroma_server import RemoteChroma

pytestmark = pytest.mark.anyio

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
VECTORS = np.ones((2, 3), np.float32)


class StandIn:
    """The parts of a Chroma server that the store asks, with an answer to queries that a test may replace."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.collection_id = str(uuid.uuid4())
        self.count = 7
        self.answer: Answer = self.found
        self.began = anyio.Event()
        self.stores: list[RemoteChroma] = []
        app = web.Application()
        app.router.add_get("/api/v2/tenants/{tenant}/databases/{database}/collections/{name}", self._collection)
        app.router.add_get("/api/v2/tenants/{tenant}/databases/{database}/collections/{id}/count", self._count)
        app.router.add_post("/api/v2/tenants/{tenant}/databases/{database}/collections/{id}/query", self._query)
        self.server = TestServer(app, host="127.0.0.1")

    def store(self, **settings: Any) -> RemoteChroma:
        """Closed with the server, also when a test fails."""
        self.stores.append(RemoteChroma("127.0.0.1", self.server.port or 0, "passages", **settings))
        return self.stores[-1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def _note(self, request: web.Request) -> None:
        self.asked.append((request.method, request.rel_url.raw_path, dict(request.headers)))

    async def _collection(self, request: web.Request) -> web.Response:
        self._note(request)
        return web.json_response({"id": self.collection_id, "dimension": 3, "configuration_json": {"hnsw": None}})

    async def _count(self, request: web.Request) -> web.Response:
        self._note(request)
        return web.json_response(self.count)

    async def _query(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        self.began.set()
        return await self.answer(request)

    async def found(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        row = [f"p{number}" for number in range(asked["n_results"])]
        rows = len(asked["query_embeddings"])
        answer = {"ids": [row] * rows, "documents": [row] * rows, "distances": [[0.5] * len(row)] * rows}
        return web.json_response(answer)


def answering(status: int, body: bytes = b"", **headers: str) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(
            status=status, body=body, headers={name.replace("_", "-"): v for name, v in headers.items()}
        )

    return answer


async def hang_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def never(request: web.Request) -> web.StreamResponse:
    await anyio.sleep_forever()
    raise AssertionError


async def cut_short(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Length": "1000"})
    await answer.prepare(request)
    await answer.write(b'{"ids": [[')
    assert request.transport is not None
    request.transport.abort()
    return answer


@pytest.fixture
async def chroma() -> AsyncIterator[StandIn]:
    stand_in = StandIn()
    await stand_in.server.start_server()
    yield stand_in
    for store in stand_in.stores:
        await store.aclose()
    await stand_in.server.close()


@pytest.mark.parametrize(
    ("answer", "kind", "cause"),
    [
        (answering(429, Retry_After="3"), TooManyRequests, "429"),
        (answering(503), PassingFault, "503"),
        (hang_up, PassingFault, "reset"),
        (cut_short, PassingFault, "reset"),
        (never, PassingFault, "timeout"),
        (answering(200, b'{"ids": [['), PassingFault, "malformed"),
        (answering(200, b"<html>welcome</html>"), PassingFault, "malformed"),
        (answering(200, b"[]"), PassingFault, "malformed"),
        (answering(200, b'{"ids": [["a"]]}'), PassingFault, "malformed"),
        (answering(200, b'{"ids": [["a"], ["b"]], "distances": [[1], ["far"]]}'), PassingFault, "malformed"),
        (answering(200, b'{"ids": [["a"], ["b"]], "documents": [["x"]]}'), PassingFault, "malformed"),
        (answering(422), RefusedInput, None),
        (answering(401), StoreError, None),
        (answering(302, Location="http://127.0.0.1:9/"), StoreError, None),
    ],
)
async def test_every_answer_is_a_fault_of_its_kind_and_the_store_goes_on(
    chroma: StandIn, answer: Answer, kind: type[SearchError], cause: str | None
) -> None:
    # Short only where the deadline is what is tested: a busy machine answers late.
    store = chroma.store(token="a-secret", timeout=1.0 if answer is never else 30.0)
    await store.open()
    chroma.answer = answer
    with pytest.raises(kind) as caught:
        await store.query(VECTORS, 2)
    assert type(caught.value) is kind
    assert getattr(caught.value, "cause", None) == cause
    assert "a-secret" not in f"{caught.value!r} {caught.value.__cause__!r}"
    chroma.answer = chroma.found
    found = await store.query(VECTORS, 2)
    assert [[passage.id for passage in row] for row in found] == [["p0", "p1"]] * 2
    await store.aclose()


@pytest.mark.parametrize("how", ["a fault", "a deadline", "a cancellation"])
async def test_an_open_that_fails_leaves_no_session(chroma: StandIn, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def late(self: RemoteChroma, collection: str) -> int:
        await anyio.sleep_forever()
        raise AssertionError

    chroma.count = "many"  # type: ignore[assignment]
    if how == "a cancellation":
        monkeypatch.setattr(RemoteChroma, "_count", late)
    store = chroma.store(timeout=1e-6 if how == "a deadline" else 30.0)
    with anyio.move_on_after(0.2 if how == "a cancellation" else 30) as scope:
        with pytest.raises(PassingFault):
            await store.open()
    assert scope.cancelled_caught == (how == "a cancellation")
    assert store._server._session is None
    with pytest.raises(StoreError, match="is not open"):
        await store.query(VECTORS, 1)


async def test_how_long_the_server_asks_to_wait(chroma: StandIn) -> None:
    store = chroma.store()
    await store.open()
    chroma.answer = answering(429, Retry_After="3")
    with pytest.raises(TooManyRequests) as caught:
        await store.query(VECTORS, 2)
    assert caught.value.retry_after == 3
    await store.aclose()


async def test_cancelled_requests_leave_the_connections_to_others(chroma: StandIn) -> None:
    """More than there are connections are cancelled at once; later ones are answered none the less."""
    store = chroma.store()
    await store.open()
    chroma.answer = never
    with anyio.move_on_after(30) as scope:
        async with anyio.create_task_group() as group:
            for _ in range(3 * store.max_requests):
                group.start_soon(store.query, VECTORS, 1)
            await chroma.began.wait()
            group.cancel_scope.cancel()
    assert not scope.cancelled_caught
    chroma.answer = chroma.found
    async with anyio.create_task_group() as group:
        for _ in range(3 * store.max_requests):
            group.start_soon(store.query, VECTORS, 1)
    await store.aclose()


async def test_a_token_tenant_and_database_reach_every_request(chroma: StandIn) -> None:
    store = chroma.store(token=" a-secret\n", headers={"X-Mine": "yes"}, tenant="a tenant", database="b/c")
    await store.open()
    await store.query(VECTORS, 1)
    assert len(chroma.asked) == 3
    for _, path, headers in chroma.asked:
        assert path.startswith("/api/v2/tenants/a%20tenant/databases/b%2Fc/collections/")
        assert (headers["Authorization"], headers["X-Mine"]) == ("Bearer a-secret", "yes")
    assert "a tenant" in store.name
    assert "a-secret" not in f"{store.name} {store.__dict__} {store._server.__dict__}"
    await store.aclose()


async def test_two_stores_in_one_loop_keep_their_headers(chroma: StandIn) -> None:
    stores = [chroma.store(headers={"X-Mine": name}) for name in "ab"]
    for store in stores:
        await store.open()
    chroma.asked.clear()
    for store in stores:
        assert await store.count() == 7
    assert [headers["X-Mine"] for _, _, headers in chroma.asked] == ["a", "b"]
    await stores[0].aclose()
    assert await stores[1].count() == 7
    await stores[1].aclose()


@pytest.mark.parametrize("suffix", ["", "/", "/api/v2", "/api/v2/?x=1#y"])
async def test_a_whole_url(chroma: StandIn, suffix: str) -> None:
    store = RemoteChroma(f"{chroma.url.replace('//', '//me:a-secret@')}{suffix}", 1, "passages")
    await store.open()
    expected = base64.b64encode(b"me:a-secret").decode()
    assert {headers["Authorization"] for _, _, headers in chroma.asked} == {f"Basic {expected}"}
    assert store.name == f"Chroma collection 'passages' at 127.0.0.1:{chroma.server.port}"
    await store.aclose()


@pytest.mark.parametrize(
    "settings",
    [{"host": "ftp://x"}, {"host": "http://"}, {"host": "a/b"}, {"token": ""}, {"token": "ä"}, {"timeout": 0}],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        RemoteChroma(**settings)


async def test_chroma_cloud_by_its_environment(chroma: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"API_KEY": "ck-secret", "TENANT": "t-env", "DATABASE": "d-env"}.items():
        monkeypatch.setenv(f"CHROMA_{name}", value)
    store = RemoteChroma.cloud("passages", host=chroma.url)
    await store.open()
    assert all(path.startswith("/api/v2/tenants/t-env/databases/d-env/") for _, path, _ in chroma.asked)
    assert {headers["X-Chroma-Token"] for _, _, headers in chroma.asked} == {"ck-secret"}
    assert not any("Authorization" in headers for _, _, headers in chroma.asked)
    assert store.max_requests == 10
    await store.aclose()


def test_chroma_cloud_wants_a_key_tenant_and_database(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "TENANT", "DATABASE"):
        monkeypatch.delenv(f"CHROMA_{name}", raising=False)
    with pytest.raises(ConfigurationError, match="requires CHROMA_API_KEY, CHROMA_TENANT, CHROMA_DATABASE: "):
        RemoteChroma.cloud("passages", tenant="t")
    store = RemoteChroma.cloud("passages", api_key="ck-secret", tenant="t", database="d")
    assert store.name == "Chroma collection 'passages' at api.trychroma.com:443 (tenant 't', database 'd')"


async def test_the_fingerprint_follows_the_collection(chroma: StandIn) -> None:
    store = chroma.store()
    with pytest.raises(StoreError, match="not open"):
        _ = store.fingerprint
    await store.open()
    assert store.fingerprint == f"{chroma.collection_id}-7"
    chroma.count = 8
    await store.count()
    assert store.fingerprint == f"{chroma.collection_id}-8"
    await store.aclose()


def test_what_an_event_loop_left_open_is_opened_anew_by_the_next(chroma_port: int) -> None:
    store = RemoteChroma("127.0.0.1", chroma_port, f"test-{uuid.uuid4().hex}", create=True)

    async def open_and_count() -> int:
        await store.open()
        return await store.count()

    async def close() -> None:
        await store.open()
        await store.aclose()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # that is what leaving it open deserves
        assert asyncio.run(open_and_count()) == 0
        assert asyncio.run(open_and_count()) == 0
        asyncio.run(close())
        gc.collect()


async def test_a_missing_tenant_and_database_are_named(chroma_port: int) -> None:
    wrong: list[dict[str, Any]] = [
        {"tenant": "nobody"},
        {"database": "nowhere"},
        {"database": "nowhere", "create": True},
    ]
    for settings in wrong:
        with pytest.raises(
            StoreError, match=r"(Tenant|Database|database).*does not exist|tenant and database"
        ) as caught:
            await RemoteChroma("127.0.0.1", chroma_port, "abc", **settings).open()
        assert caught.value.is_fatal


async def test_a_database_of_another_tenant(chroma_port: int) -> None:
    tenant, database = f"tenant-{uuid.uuid4().hex}", "own-database"
    server = await chromadb.AsyncHttpClient("127.0.0.1", chroma_port, settings=Settings(anonymized_telemetry=False))
    await server._server.create_tenant(tenant)  # type: ignore[attr-defined]
    await server._server.create_database(database, tenant)  # type: ignore[attr-defined]
    await server._server.__aexit__(None, None, None)  # type: ignore[attr-defined]
    there = RemoteChroma("127.0.0.1", chroma_port, "passages", tenant=tenant, database=database, create=True)
    await there.open()
    await there.add([Passage("a", "A", "text")], np.ones((1, 3), np.float32))
    assert await there.count() == 1
    await there.aclose()
    with pytest.raises(StoreError, match="does not exist"):
        await RemoteChroma("127.0.0.1", chroma_port, "passages").open()


async def test_a_server_that_is_killed_and_returns(chroma_process: Any, passages: list[Passage], embedder: Any) -> None:
    """Its folder stays. Only passing faults are met meanwhile, and the same store answers again, with nothing reopened."""
    vectors = embedder.embed([passage.text for passage in passages])
    store = RemoteChroma("127.0.0.1", chroma_process.port, "passages", create=True)
    await store.open()
    await store.add(passages, vectors)
    await store.count()
    fingerprint = store.fingerprint
    causes: Counter[str] = Counter()
    answered = 0
    is_answering, is_gone, is_back = anyio.Event(), anyio.Event(), anyio.Event()

    async def ask_until_it_is_back(number: int) -> None:
        nonlocal answered
        while True:
            was_back = is_back.is_set()
            try:
                ((found,),) = await store.query(vectors[number : number + 1], 1)
            except PassingFault as fault:
                assert not was_back
                causes[fault.cause] += 1
                if fault.cause == "unreachable":
                    is_gone.set()
                await anyio.sleep(0.01)  # as a client that paces itself
            else:
                assert found.id == passages[number].id
                answered += 1
                if answered == 20:
                    is_answering.set()
                if was_back:
                    return

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for number in range(len(passages)):
                group.start_soon(ask_until_it_is_back, number)
            await is_answering.wait()
            await anyio.to_thread.run_sync(chroma_process.kill)
            await is_gone.wait()
            chroma_process.start()
            await anyio.to_thread.run_sync(chroma_process.wait)
            is_back.set()
    assert set(causes) <= {"reset", "unreachable"}
    assert await store.count() == len(passages)
    assert store.fingerprint == fingerprint
    await store.aclose()
