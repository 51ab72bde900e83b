"""Thousands of searches through real clients while both services fail at a 10 % rate: each ends once, with the right answer.

The embedder is Google's client against the stand-in server; the store is a real Chroma server behind a faulty proxy.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import anyio
import pytest
from aiohttp import web

import searchr1_async as sr
from benchmarks.shared.gemini_stand_in import Fault, GeminiStandIn, StandInSettings

pytestmark = pytest.mark.anyio

ENTITIES = 300
KEY = "a-key-of-no-service"
PACING = sr.search.PacingSettings(first_pause=0.01, longest_pause=0.1, request_timeout=1.0)

GEMINI_FAULTS = {
    Fault.TOO_MANY: 0.02,
    Fault.TOO_MANY_SILENT: 0.01,
    Fault.INTERNAL: 0.015,
    Fault.UNAVAILABLE: 0.015,
    Fault.RESET: 0.015,
    Fault.BROKEN_JSON: 0.01,
    Fault.ONE_FEWER: 0.005,
    Fault.SLOW: 0.005,
    Fault.EMPTY: 0.005,
}
"""10 % of requests, over all transient faults."""


class BreakingProxy:
    """Forwards requests to a Chroma server; answers 10 % of the queries with server or network faults."""

    KINDS = ("429", "429 silent", "500", "503", "503 wait", "reset", "cut", "no json", "slow")

    def __init__(self, target: str, rate: float, seed: int) -> None:
        self._target, self._rate = target, rate
        self._random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.queries = 0

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[int]:
        """Yields its port."""
        application = web.Application(client_max_size=1 << 26)
        application.router.add_route("*", "/{path:.*}", self._pass)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            try:
                yield runner.addresses[0][1]
            finally:
                await runner.cleanup()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.path.endswith("/query"):
            self.queries += 1
            if self._random.random() < self._rate:
                kind = self._random.choice(self.KINDS)
                self.faults[kind] += 1
                return await self._break(request, kind)
        headers = {key: value for key, value in request.headers.items() if key.lower() not in ("host", "connection")}
        async with self._session.request(
            request.method, f"{self._target}{request.rel_url}", data=body, headers=headers
        ) as answer:
            kept = {key: value for key, value in answer.headers.items() if key.lower().startswith("content-type")}
            return web.Response(status=answer.status, body=await answer.read(), headers=kept)

    async def _break(self, request: web.Request, kind: str) -> web.StreamResponse:
        match kind:
            case "429":
                return web.Response(status=429, headers={"Retry-After": "0"})
            case "429 silent":
                return web.Response(status=429)
            case "500" | "503":
                return web.Response(status=int(kind), text="trouble")
            case "503 wait":
                return web.Response(status=503, headers={"Retry-After": "0"})
            case "reset":
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            case "cut":
                cut = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
                await cut.prepare(request)
                await cut.write(b'{"ids":[["')
                assert request.transport is not None
                request.transport.close()
                return cut
            case "no json":
                return web.Response(text='{"ids":[["a"', content_type="application/json")
            case _:
                await anyio.sleep(PACING.request_timeout + 1)
                return web.Response(status=504)


async def searches_under_fire(port: int, count: int, *, at_once: int, seed: int) -> None:
    generator = random.Random(seed)
    passages = [
        sr.Passage(f"p{number}", f"entity{number}", f"The entity{number} lies in region{number}.")
        for number in range(ENTITIES)
    ]
    settings = StandInSettings(
        fault_rates={}, retry_after=0.01, says_when="details", slow_seconds=PACING.request_timeout + 1, seed=seed
    )
    async with GeminiStandIn(settings) as gemini:
        embedder = sr.search.GeminiEmbedder(api_key=KEY, base_url=gemini.base_url)
        collection = f"faults-{uuid.uuid4().hex}"
        store = sr.search.RemoteChroma("127.0.0.1", port, collection, create=True)
        await embedder.open()
        await store.open()
        for start in range(0, ENTITIES, 100):
            part = passages[start : start + 100]
            await store.add(part, await embedder.embed_passages([passage.text for passage in part]))
        await store.aclose()
        await embedder.aclose()
        proxy = BreakingProxy(f"http://127.0.0.1:{port}", 0.1, seed)
        async with proxy.serve() as proxy_port:
            store = sr.search.RemoteChroma("127.0.0.1", proxy_port, collection)
            ended: Counter[int] = Counter()
            slots = anyio.Semaphore(at_once)

            async def one(search: sr.Search, number: int) -> None:
                async with slots:
                    entities = [generator.randrange(ENTITIES) for _ in range(generator.choice((1, 1, 1, 3)))]
                    # Different wording, same entity: another query, the same passage.
                    queries = [f"where is entity{entity} number {number}" for entity in entities]
                    found = await search.search(queries)
                    assert [row[0].id for row in found] == [f"p{entity}" for entity in entities]
                    ended[number] += 1

            async with sr.Search(embedder, store, n_results=2, pacing=PACING, deadline=60) as search:
                gemini.settings = StandInSettings(**{**vars(settings), "fault_rates": GEMINI_FAULTS})
                async with anyio.create_task_group() as tasks:
                    for number in range(count):
                        tasks.start_soon(one, search, number)
                statistics = search.statistics
    assert ended == Counter(range(count)), "each ended once"
    assert statistics.failed == 0
    assert sum(gemini.counts.faults.values()) > 0.05 * statistics.embedding.requests
    assert sum(statistics.embedding.faults.values()) > 0
    assert sum(statistics.querying.faults.values()) == pytest.approx(sum(proxy.faults.values()), abs=2)
    assert (statistics.embedding.in_flight, statistics.querying.in_flight) == (0, 0)


async def test_every_search_ends_right_while_one_request_in_ten_fails(
    chroma_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await searches_under_fire(chroma_port, 200, at_once=6, seed=1)
    assert caplog.records
    assert KEY not in caplog.text
    assert "where is entity" not in caplog.text, "no log contains a query, not even a client's"


@pytest.mark.slow
async def test_ten_thousand_searches_end_right_while_one_request_in_ten_fails(chroma_port: int) -> None:
    await searches_under_fire(chroma_port, 10_000, at_once=64, seed=2)
