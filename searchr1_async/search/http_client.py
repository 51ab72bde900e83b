"""A served search as the store of a search, which then needs no embedder; and the messages of its protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import anyio
import msgspec

from searchr1_async.boundary.network import checked_url
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError, StoreError
from searchr1_async.search.faults import Wording, malformed
from searchr1_async.search.http_session import HttpSession, header_token
from searchr1_async.search.stores.vector_store import Found

PROTOCOL = 2
MAX_QUERIES = 4_096
"""Per request; the original Search-R1 client sends a whole batch, 2,560 with its settings."""
MAX_RESULTS = 100

Queries = Annotated[list[str], msgspec.Meta(max_length=MAX_QUERIES)]


class Health(msgspec.Struct):
    """The answer of ``GET /health``: what is served, and whether the request had the token, if one is required."""

    protocol: int
    version: str
    passages: int
    embedder: str
    embedder_fingerprint: str
    store_fingerprint: str
    requests: int
    """Most at once."""
    is_authorized: bool


class SearchRequest(msgspec.Struct):
    """The body of ``POST /search``: the nearest passages of each query."""

    queries: Queries
    n_results: Annotated[int, msgspec.Meta(ge=1, le=MAX_RESULTS)] | None = None
    """None for the default of the served search."""


class SearchReply(msgspec.Struct):
    """The answer of ``POST /search``: passages per query, none for a query without a letter or digit."""

    found: list[tuple[Passage, ...]]
    store_fingerprint: str


class ServedSearch:
    """A search served by ``searchr1 serve`` at a URL. Each call is one request, tried once, of at most ``timeout`` seconds.

    Raises ConfigurationError for a malformed URL or token.
    """

    max_queries = 256

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 60.0) -> None:
        if "@" in url:  # not quoted: it may contain a password
            raise ConfigurationError("the address of a served search takes no user and password: pass token=")
        base = checked_url(url, "the address of a served search")
        wording = Wording(
            f"the search served at {base}",
            StoreError,
            denied="pass the token it was started with, token=",
            missing="this server is not `searchr1 serve` of this version: check host and port (for a Chroma server, pass collection=)",
            unreachable="check that it is up and its address",
        )
        headers = {} if token is None else {"Authorization": f"Bearer {header_token(token)}"}
        self._session = HttpSession(wording, base, headers, timeout=timeout)
        self._health: Health | None = None

    @property
    def name(self) -> str:
        return self._session.name

    @property
    def _known(self) -> Health:
        if self._health is None:
            raise StoreError(f"{self.name} is not open")
        return self._health

    @property
    def embedder_name(self) -> str:
        return f"{self._known.embedder} at {self._session.url}"

    @property
    def embedder_fingerprint(self) -> str:
        return self._known.embedder_fingerprint

    @property
    def fingerprint(self) -> str:
        """Of the served store, updated with every answer, so that a replaced store is noticed."""
        return self._known.store_fingerprint

    @property
    def max_requests(self) -> int:
        return max(1, self._known.requests)

    async def open(self) -> None:
        """Asks what is served. Raises StoreError, fatal for another kind of service or a wrong token."""
        if self._health is not None and self._session.is_open:
            return
        await self._session.open()
        try:
            self._health = await self._look(self._health)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise

    async def _look(self, known: Health | None) -> Health:
        body, wording = await self._session.request("GET", "/health"), self._session.wording
        try:
            found = msgspec.json.decode(body, type=Health)
        except msgspec.DecodeError as error:
            raise StoreError(f"{self.name}: {wording.missing}", is_fatal=True) from error
        if found.protocol != PROTOCOL:
            raise StoreError(
                f"{self.name} uses protocol {found.protocol}, not {PROTOCOL}: run the same version on both sides",
                is_fatal=True,
            )
        if not found.is_authorized:
            raise StoreError(f"{self.name} requires its token: {wording.denied}", is_fatal=True)
        if known is not None and known.embedder_fingerprint != found.embedder_fingerprint:
            raise StoreError(f"{self.name} now embeds with another model: open a new search", is_fatal=True)
        return found

    async def search(self, queries: Sequence[str], n_results: int) -> Found:
        """The nearest passages of each query. Raises as :meth:`~searchr1_async.search.stores.vector_store.Store.query`."""
        body = msgspec.json.encode(SearchRequest(list(queries), n_results))
        answer = await self._session.request("POST", "/search", body)
        try:
            reply = msgspec.json.decode(answer, type=SearchReply)
        except msgspec.DecodeError as error:
            raise malformed(self.name) from error
        self._known.store_fingerprint = reply.store_fingerprint
        return tuple(reply.found)

    async def count(self) -> int:
        """Number of passages. Raises as :meth:`search`."""
        return (await self._look(self._health)).passages

    async def aclose(self) -> None:
        """Keeps what is known of the service, for its names and fingerprints."""
        await self._session.aclose()
