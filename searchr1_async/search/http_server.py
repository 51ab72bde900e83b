"""Serves an open search over HTTP: read-only, limited, in the caller's event loop."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import anyio
import msgspec
from aiohttp import web
from yarl import URL

from searchr1_async.episodes.prompts import clean_query
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError, SearchError
from searchr1_async.search.http_client import MAX_RESULTS, PROTOCOL, Health, Queries, SearchReply, SearchRequest
from searchr1_async.search.http_session import header_token

if TYPE_CHECKING:
    from searchr1_async.search.search import Search

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=msgspec.Struct)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

DEFAULT_PORT = 8200
MAX_REQUESTS = 64
MAX_BYTES = 8 << 20
"""Of a request's body."""
REQUEST_SECONDS = 120.0
"""Per request, including reading its body."""
GRACE_SECONDS = 5.0
"""For requests in flight at shutdown."""
COUNT_SECONDS = 5.0
"""For the store to say that it is up."""


class RetrieveRequest(msgspec.Struct):
    """The body of ``POST /retrieve``, as the original Search-R1 server reads it; ``topk`` 0 and None is the search's default."""

    queries: Queries
    topk: Annotated[int, msgspec.Meta(ge=0, le=MAX_RESULTS)] | None = None
    return_scores: bool = False


_KINDS = {400: "malformed", 413: "too_large", 422: "malformed"}
"""One word for programs by status; "unknown" for another endpoint or method."""


@asynccontextmanager
async def serve_search(
    search: Search,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    token: str | None = None,
    max_requests: int = MAX_REQUESTS,
) -> AsyncIterator[str]:
    """Serves a search while the block runs; opens it if needed. Yields the URL for clients on this machine.

    ::

        async with serve_search(await Search.open("wiki18.index"), host="0.0.0.0") as address:
            await anyio.sleep_forever()     # on other machines: await Search.open(address)

    ``GET /health`` describes the search; ``POST /search`` is what ``Search.open`` asks; ``POST /retrieve`` is compatible with the
    original Search-R1 server. Errors have the body ``{"error": kind, "message": words}``. Shutdown finishes requests in flight.

    Args:
        search: the search; its ``n_results`` is the default of ``/retrieve``.
        host: to listen on; ``"0.0.0.0"`` for all addresses of this machine.
        port: TCP; 0 picks a free one.
        token: required by every request but ``/health`` (``Authorization: Bearer``); None for open access.
        max_requests: at once; further ones get 429 with ``Retry-After``.

    Raises:
        ConfigurationError: cannot listen on host and port, the token does not fit a header, or ``max_requests`` is below 1.
        CorpusError, SearchError: from opening the search.
    """
    if max_requests < 1:
        raise ConfigurationError(f"max_requests is {max_requests}: give at least 1")
    service = _Service(search, None if token is None else header_token(token), max_requests)
    application = service.application()
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=GRACE_SECONDS)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(_stopped, runner)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            raise ConfigurationError(f"cannot listen on {host}:{port} ({error}): use another host or port") from error
        await stack.enter_async_context(search)
        stack.push_async_callback(_stopped, runner)  # before the search closes: requests in flight still need it
        service.is_open = True
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        yield str(URL.build(scheme="http", host=reachable, port=runner.addresses[0][1])).rstrip("/")


async def _stopped(runner: web.AppRunner) -> None:
    with anyio.CancelScope(shield=True):
        await runner.cleanup()


class _Service:
    """Request handlers of one served search."""

    def __init__(self, search: Search, token: str | None, max_requests: int) -> None:
        self._search = search
        self._token = None if token is None else f"Bearer {token}".encode()
        self._max_requests = max_requests
        self._busy = 0
        self.is_open = False

    def application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BYTES, middlewares=[self._guard])
        application.router.add_get("/health", self._health)
        application.router.add_post("/search", self._answer)
        application.router.add_post("/retrieve", self._retrieve)
        return application

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Checks the token and the limits, and maps errors to responses."""
        is_health = request.path == "/health"
        if not is_health and not self._is_authorized(request):
            return _error(401, "token", "this search requires its token: Authorization: Bearer …")
        if not self.is_open:
            return _error(503, "opening", "the search is opening: retry later")
        if not is_health and self._busy >= self._max_requests:
            return _error(429, "busy", f"{self._busy} requests are in progress: retry later", retry_after=1)
        self._busy += not is_health
        try:
            with anyio.fail_after(REQUEST_SECONDS):
                return await handler(request)
        except web.HTTPException as error:
            return _error(error.status, _KINDS.get(error.status, "unknown"), error.text or error.reason)
        except TimeoutError:
            return _error(504, "timeout", f"not answered within {REQUEST_SECONDS:g} s")
        except SearchError as fault:  # its message may name a folder or an address
            logger.warning("a request to the served search failed: %s", fault)
            return _error(502, "failed", f"the search failed ({type(fault).__name__}): see the service's log")
        except Exception:
            logger.exception("a request to the served search failed")
            return _error(500, "failed", "the request failed: see the service's log")
        finally:
            self._busy -= not is_health

    def _is_authorized(self, request: web.Request) -> bool:
        if self._token is None:
            return True
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self._token)

    async def _health(self, request: web.Request) -> web.Response:
        search, store = self._search, self._search.store
        assert store is not None, "an open search has a store"
        try:
            with anyio.fail_after(COUNT_SECONDS):
                passages = await store.count()
        except (SearchError, TimeoutError) as error:
            logger.warning("the served store does not answer: %s", error)
            return _error(503, "store", "the store does not answer")
        embedder = Path(search.embedder_name)
        return _json(
            Health(
                protocol=PROTOCOL,
                version=version("searchr1_async"),
                passages=passages,
                embedder=embedder.name if embedder.is_absolute() else search.embedder_name,
                embedder_fingerprint=search.embedder_fingerprint,
                store_fingerprint=store.fingerprint,
                requests=self._max_requests,
                is_authorized=self._is_authorized(request),
            )
        )

    async def _answer(self, request: web.Request) -> web.Response:
        asked = _read(await request.read(), SearchRequest)
        # Whole passages: the client's own search trims them.
        found = await self._found(asked.queries, asked.n_results, max_passage_words=0)
        assert self._search.store is not None, "an open search has a store"
        return _json(SearchReply(found, self._search.store.fingerprint))

    async def _retrieve(self, request: web.Request) -> web.Response:
        asked = _read(await request.read(), RetrieveRequest)
        found = await self._found(asked.queries, asked.topk or None)
        rows = [[_retrieved(each, with_score=asked.return_scores) for each in row] for row in found]
        return _json({"result": rows})

    async def _found(self, texts: list[str], n_results: int | None, **options: Any) -> list[tuple[Passage, ...]]:
        """The passages of each text; none for one that cannot be searched for."""
        queries = [clean_query(text) for text in texts]
        searched = [query for query in queries if query is not None]
        found = iter(await self._search.search(searched, n_results, **options))
        return [() if query is None else next(found) for query in queries]


def _read(body: bytes, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:  # names the field and the type, never the value
        raise web.HTTPUnprocessableEntity(text=str(error)) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise web.HTTPBadRequest(text="the body is not JSON") from error


def _retrieved(passage: Passage, *, with_score: bool) -> dict[str, Any]:
    """A row of the original's corpus: the title in quotes, a newline, the text."""
    title = " ".join(passage.title.split())  # clients take the first line as the title
    document = {"id": passage.id, "contents": f'"{title}"\n{passage.text}'}
    return {"document": document, "score": float(passage.score)} if with_score else document


def _json(value: Any) -> web.Response:
    try:
        body = msgspec.json.encode(value, enc_hook=float)  # a store's scores may be numpy's
    except UnicodeEncodeError:  # a passage with a lone surrogate, which is not valid UTF-8
        plain = msgspec.to_builtins(value, enc_hook=float)
        body = json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace")
    return web.Response(body=body, content_type="application/json")


def _error(status: int, kind: str, message: str, retry_after: int | None = None) -> web.Response:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    body = msgspec.json.encode({"error": kind, "message": message})
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)
