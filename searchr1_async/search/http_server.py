"""Serves an open search over HTTP: read-only, limited, in the caller's event loop."""

from __future__ import annotations

import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import anyio
import anyio.to_thread
import numpy as np
from aiohttp import web
from yarl import URL

from searchr1_async.errors import ConfigurationError, SearchError, SearchUnavailableError
from searchr1_async.search.embedders import Embedder, checked_vectors
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests
from searchr1_async.search.http_session import header_token
from searchr1_async.search.stores.vector_store import Found, Store
from searchr1_async.search.wire import (
    DIMENSION_HEADER,
    EMBEDDER_HEADER,
    SERVICE,
    BadRequest,
    ServedFacts,
    ServingLimits,
    dumps,
    pack_found,
    pack_vectors,
    parts_of,
    read_embed,
    read_query,
    read_retrieve,
    retrieved,
    shown_name,
)

if TYPE_CHECKING:
    from searchr1_async.search.search import Search

logger = logging.getLogger(__name__)

Asked = TypeVar("Asked")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

DEFAULT_PORT = 8200
HEALTH = "/health"
COUNT_EVERY = 1.0
"""Seconds for which a store's last answer counts as healthy, so that health checks stay cheap."""
COUNT_SECONDS = 5.0
THREAD_BYTES = 1 << 18
"""Longer bodies are parsed in a thread: 8 MB of hostile JSON takes over 100 ms."""


@asynccontextmanager
async def serve_search(
    search: Search,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    token: str | None = None,
    limits: ServingLimits | None = None,
) -> AsyncIterator[str]:
    """Serves a search while the block runs; opens it if needed.

    ::

        async with serve_search(await Search.open("wiki18.index"), host="0.0.0.0") as address:
            await anyio.sleep_forever()     # on other machines: await Search.open(address)

    ``GET /health`` describes the search; 503 while it opens or its store is down. ``POST /retrieve`` is compatible with the
    original Search-R1 server and uses ``Search.search``, with its batching and cache. ``POST /embed`` and ``POST /query`` go
    directly to the embedder and the store, within their concurrency limits;
    :class:`~searchr1_async.search.http_client.ServedEmbedder` and :class:`~searchr1_async.search.http_client.ServedStore` are their
    clients. Errors have the body ``{"error": kind, "message": words}``. Shutdown finishes requests in flight first.

    Args:
        search: the search; its ``n_results`` is the default of ``/retrieve``.
        host: to listen on; ``"0.0.0.0"`` for all addresses of this machine.
        port: TCP; 0 picks a free one.
        token: required by every request but ``/health`` (``Authorization: Bearer``); None for open access.
        limits: see :class:`ServingLimits`.

    Yields:
        The URL for clients on this machine.

    Raises:
        ConfigurationError: cannot listen on host and port, or the token does not fit a header.
        CorpusError, SearchError: from opening the search.
    """
    limits = ServingLimits() if limits is None else limits
    service = _Service(search, None if token is None else header_token(token), limits)
    runner = web.AppRunner(
        service.application(), access_log=None, handler_cancellation=True, shutdown_timeout=limits.grace
    )
    try:
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            raise ConfigurationError(f"cannot listen on {host}:{port} ({error}): use another host or port") from error
        async with search:
            assert search.store is not None, "an open search has a store"
            service.begin(search.store, search.embedder)
            try:
                bound = runner.addresses[0][1]
                yield str(URL.build(scheme="http", host=_reachable(host), port=bound)).rstrip("/")
            finally:
                # Before the search closes: requests in flight still need it.
                with anyio.CancelScope(shield=True):
                    await runner.cleanup()
    finally:
        with anyio.CancelScope(shield=True):
            await runner.cleanup()


class _Opened:
    """The services of an open search, with their concurrency limits."""

    def __init__(self, store: Store, embedder: Embedder) -> None:
        self.store, self.embedder = store, embedder
        self.embedding = anyio.Semaphore(max(1, embedder.max_requests))
        self.querying = anyio.Semaphore(max(1, store.max_requests))
        self._counting = anyio.Lock()
        self._heard_at = -math.inf
        self._passages: int | None = None

    async def query(self, vectors: Any, n_results: int) -> Found:
        found: list[Any] = []
        most = max(1, self.store.max_queries)
        for start in range(0, len(vectors), most):
            async with self.querying:
                found += await self.store.query(vectors[start : start + most], n_results)
        self._heard_at = time.monotonic()
        return tuple(found)

    async def passages(self) -> int | None:
        """Number of passages; None while the store is down. Skips the request if the store answered recently."""
        async with self._counting:
            if time.monotonic() - self._heard_at > COUNT_EVERY or self._passages is None:
                try:
                    with anyio.fail_after(COUNT_SECONDS):
                        self._passages = await self.store.count()
                except (SearchError, TimeoutError) as error:
                    logger.warning("the served store does not answer: %s", error)
                    return None
                self._heard_at = time.monotonic()
            return self._passages


class _Service:
    """Request handlers of one served search."""

    def __init__(self, search: Search, token: str | None, limits: ServingLimits) -> None:
        self._search = search
        self._token = None if token is None else f"Bearer {token}".encode()
        self._limits = limits
        self._opened: _Opened | None = None
        self._busy = 0

    def application(self) -> web.Application:
        application = web.Application(client_max_size=self._limits.body_bytes, middlewares=[self._guard])
        application.router.add_get(HEALTH, self._health)
        application.router.add_post("/embed", self._embed)
        application.router.add_post("/query", self._query)
        application.router.add_post("/retrieve", self._retrieve)
        return application

    def begin(self, store: Store, embedder: Embedder) -> None:
        """Called once the search is open."""
        self._opened = _Opened(store, embedder)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Checks the token and limits, and maps errors to responses."""
        try:
            if request.path == HEALTH:
                return await handler(request)
            if not self._is_authorized(request):
                return _error(401, "token", "this search requires its token: Authorization: Bearer …")
            if self._busy >= self._limits.requests:
                return _error(429, "busy", f"{self._busy} requests are in progress: retry later", retry_after=1.0)
            self._busy += 1
            try:
                with anyio.fail_after(self._limits.seconds):
                    return await handler(request)
            finally:
                self._busy -= 1
        except BadRequest as refused:
            return _error(refused.status, refused.kind, str(refused))
        except web.HTTPException as error:
            return _error(error.status, *_kind_and_message(error, self._limits))
        except TimeoutError:
            return _error(504, "timeout", f"not answered within {self._limits.seconds:g} s")
        except SearchError as fault:
            return _error_of(fault)
        except Exception:
            logger.exception("a request to the served search failed")
            return _error(500, "failed", "the request failed: see the service's log")

    def _is_authorized(self, request: web.Request) -> bool:
        if self._token is None:
            return True
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self._token)

    def _ready(self) -> _Opened:
        if self._opened is None:
            raise BadRequest("opening", "the search is opening: retry later", 503)
        return self._opened

    async def _read(self, request: web.Request, read: Callable[[bytes, ServingLimits], Asked]) -> Asked:
        body = await request.read()
        if len(body) <= THREAD_BYTES:
            return read(body, self._limits)
        return await anyio.to_thread.run_sync(read, body, self._limits, abandon_on_cancel=True)

    async def _health(self, request: web.Request) -> web.Response:
        opened, limits = self._ready(), self._limits
        passages = await opened.passages()
        if passages is None:
            return _error(503, "store", "the store does not answer")
        store, embedder = opened.store, opened.embedder
        fitting = (limits.body_bytes - 1_000) * 3 // (4 * 4 * embedder.dimension)
        facts = ServedFacts(
            url="",
            store=shown_name(store.name),
            store_fingerprint=store.fingerprint,
            passages=passages,
            dimension=embedder.dimension,
            embedder=shown_name(embedder.name),
            embedder_fingerprint=embedder.fingerprint,
            max_queries=max(1, min(limits.vectors, store.max_queries, fitting)),
            max_texts=min(limits.texts, embedder.max_texts),
            max_tokens=embedder.max_tokens,
            # One extra, in transit while the others are processed.
            query_requests=min(limits.requests, store.max_requests + 1),
            embed_requests=min(limits.requests, embedder.max_requests + 1),
            limits=asdict(limits),
            is_authorized=self._is_authorized(request),
        )
        return _json(facts.to_json(_version()))

    async def _embed(self, request: web.Request) -> web.Response:
        opened = self._ready()
        asked = await self._read(request, read_embed)
        embedder = opened.embedder
        embed = embedder.embed_passages if asked.are_passages else embedder.embed_queries
        made = [np.empty((0, embedder.dimension), np.float32)]
        for texts in parts_of(asked.texts, embedder.max_texts, embedder.max_tokens):
            async with opened.embedding:
                made.append(checked_vectors(await embed(texts), len(texts), embedder))
        return web.Response(
            body=pack_vectors(np.concatenate(made)),
            content_type="application/octet-stream",
            headers={DIMENSION_HEADER: str(embedder.dimension), EMBEDDER_HEADER: quote(embedder.fingerprint)},
        )

    async def _query(self, request: web.Request) -> web.Response:
        opened = self._ready()
        given = request.query
        body = await request.read()
        asked = read_query(body, given.get("dimension", ""), given.get("n_results", ""), self._limits)
        if (numbers := asked.vectors.shape[1]) != (expected := opened.embedder.dimension):
            raise BadRequest(
                "dimension",
                f"the index has vectors of dimension {expected}, these have {numbers}: they are from another embedder",
            )
        found = await opened.query(asked.vectors, asked.n_results)
        return _json({"found": pack_found(found), "store": opened.store.fingerprint})

    async def _retrieve(self, request: web.Request) -> web.Response:
        self._ready()
        asked = await self._read(request, read_retrieve)
        queries = [query for query in asked.queries if query is not None]
        found = await self._search.for_cleaned(queries, asked.n_results) if queries else ()
        return _json(retrieved(iter(found), asked))


def _json(value: Any) -> web.Response:
    return web.Response(body=dumps(value), content_type="application/json")


def _error(status: int, kind: str, message: str, retry_after: float | None = None) -> web.Response:
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    body = dumps({"error": kind, "message": message, "service": SERVICE})
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def _error_of(fault: SearchError) -> web.Response:
    """Uses generic messages: those of a store may name a folder or an address."""
    if isinstance(fault, RefusedInput):
        return _error(422, "refused", "the embedder or the store refuses an item of this request")
    if isinstance(fault, TooManyRequests):
        wait = max(1.0, fault.retry_after or 0.0)
        return _error(429, "busy", "the embedder or the store asks to slow down", wait)
    logger.warning("a request to the served search failed: %s", fault)
    if isinstance(fault, PassingFault | SearchUnavailableError):
        return _error(503, "unavailable", "the embedder or the store did not answer")
    return _error(502, "failed", f"the search failed ({type(fault).__name__}): see the service's log")


def _kind_and_message(error: web.HTTPException, limits: ServingLimits) -> tuple[str, str]:
    match error.status:
        case 404 | 405:
            return "unknown", "the endpoints are GET /health, POST /embed, POST /query and POST /retrieve"
        case 413:
            return "too_large", f"the body is too large: send at most {limits.body_bytes} bytes"
        case _:
            return "malformed", error.reason


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _version() -> str:
    try:
        return version("searchr1_async")
    except PackageNotFoundError:  # run from source
        return "unknown"
