"""A collection of a Chroma server, read in pages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, cast, get_args

import numpy as np

from searchr1_async.boundary.waits import in_thread
from searchr1_async.errors import StoreError
from searchr1_async.search.dispatch import Capacity, Dispatcher
from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.opening import open_store
from searchr1_async.search.passage_embedding import PACING
from searchr1_async.search.sources.base import Block, SourceFacts
from searchr1_async.search.sources.named import named_embedder
from searchr1_async.search.stores.base import Metric
from searchr1_async.search.stores.chroma import RemoteChroma
from searchr1_async.search.stores.chroma.faults import malformed
from searchr1_async.search.stores.chroma.layout import CollectionModel, read_answer
from searchr1_async.search.stores.chroma.remote import PAGE
from searchr1_async.search.stores.chroma.server import ServerDatabase

Result = TypeVar("Result")

LISTED = 50_000
"""Ids per request; Chroma Cloud limits it to a page."""
_INCLUDE = ("documents", "metadatas", "embeddings")


class ChromaServer:
    """The rows of a collection of a Chroma server, in the server's order. Nothing may write to the collection meanwhile.

    ::

        source = ChromaServer("localhost", 8000, "wiki_embeddings", embedder="gemini-embedding-001")

    Args:
        host: as for :class:`~searchr1_async.search.stores.chroma.remote.RemoteChroma`.
        port: TCP port.
        collection: collection name.
        embedder: the embedder of the vectors, recorded in the index; None if unknown.
        options: ``ssl``, ``headers``, ``token``, ``tenant``, ``database`` and ``timeout`` of ``RemoteChroma``.

    Raises:
        StoreError: Chroma does not accept the collection name.
        ConfigurationError: an invalid address or token.
        EmbeddingError: the embedder does not exist.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int = 8000,
        collection: str = "wiki_embeddings",
        *,
        embedder: str | Path | Embedder | None = None,
        **options: Any,
    ) -> None:
        self._store = _Reader(host, port, collection, **options)
        self._embedder = named_embedder(embedder)
        self._facts: SourceFacts | None = None

    @classmethod
    def cloud(
        cls, collection: str = "wiki_embeddings", *, embedder: str | Path | Embedder | None = None, **options: Any
    ) -> Self:
        """A collection of Chroma Cloud; ``options`` as for :meth:`RemoteChroma.cloud`.

        Raises:
            StoreError, ConfigurationError, EmbeddingError: as for a server.
        """
        source = cls(collection=collection, embedder=embedder)
        source._store = _Reader.cloud(collection, **options)
        return source

    async def open(self) -> SourceFacts:
        if self._facts is None:
            store = self._store
            await open_store(store, PACING)
            model = store.model
            count = await self._patiently(store.count)
            if not count or model.dimension is None:
                raise StoreError(f"{store.name} holds no passages")
            if model.space not in get_args(Metric):
                raise StoreError(f"{store.name} uses the distance {model.space!r}, which is not supported")
            metric = cast(Metric, model.space)
            fingerprint = f"chroma-{model.id}-{count}-{metric}"
            self._facts = SourceFacts(store.name, fingerprint, count, model.dimension, metric, *self._embedder)
        return self._facts

    async def blocks(self, start: int) -> AsyncIterator[Block]:
        """See :meth:`~searchr1_async.search.sources.base.VectorSource.blocks`."""
        if (facts := self._facts) is None:
            raise StoreError(f"{self._store.name} is not open")
        while start < facts.count:
            listed = await self._patiently(partial(self._store.listed, start))
            if not listed:
                raise StoreError(f"{facts.name} ends at row {start:,} of {facts.count:,}: it has changed since")
            for first in range(0, len(listed), self._store.page):
                ids = listed[first : first + self._store.page]
                answer = await self._patiently(lambda ids=ids: self._store.rows(ids))
                block = await in_thread(lambda ids=ids, answer=answer: _block(facts, ids, answer))
                start += len(ids)
                yield block

    async def kept(self, rows: int) -> None:
        """Nothing to drop."""

    async def aclose(self) -> None:
        self._facts = None
        await self._store.aclose()

    async def _patiently(self, request: Callable[[], Awaitable[Result]]) -> Result:
        """Sends one request, with the usual retries."""

        async def send(_: Sequence[None]) -> Sequence[Result]:
            return [await request()]

        once: Dispatcher[str, None, Result] = Dispatcher(
            send, name=self._store.name, capacity=lambda: Capacity(1, 1), pacing=PACING, failure=StoreError
        )
        return (await once.fetch({"once": None}))["once"]


class _Reader(RemoteChroma):
    """The store's connection, for reading rows."""

    @property
    def model(self) -> CollectionModel:
        if self._model is None:
            raise StoreError(f"{self.name} is not open")
        return self._model

    @property
    def page(self) -> int:
        """Rows per request."""
        return self._page

    async def listed(self, offset: int) -> list[str]:
        """The next ids in row order.

        Lists many at once: offsets cost the server time per row skipped, lookups by id do not.
        """
        answer = await self._get(
            {"limit": LISTED if self._page == PAGE else self._page, "offset": offset, "include": ()}
        )
        ids = answer.get("ids")
        if not isinstance(ids, list):
            raise malformed(self.name)
        return [str(own_id) for own_id in ids]

    async def rows(self, ids: Sequence[str]) -> Mapping[str, Any]:
        """The columns of rows, unordered."""
        return await self._get({"ids": ids, "limit": len(ids), "include": _INCLUDE})

    async def _get(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        server = cast(ServerDatabase, self._database)
        return await self._ask_for_good(lambda model: server.get(model.id, asked))


def _block(facts: SourceFacts, ids: Sequence[str], answer: Mapping[str, Any]) -> Block:
    """The rows in the order of ``ids``."""
    try:
        place = {str(own_id): row for row, own_id in enumerate(answer["ids"])}
        if missing := next((own_id for own_id in ids if own_id not in place), None):
            raise StoreError(f"{facts.name} no longer holds the passage {missing!r}: it has changed since")
        order = [place[own_id] for own_id in ids]
        vectors = np.array(answer["embeddings"], np.float32).reshape(-1, facts.dimension)[order]
        columns = {name: answer.get(name) or [None] * len(place) for name in ("documents", "metadatas")}
        ordered = {name: [[column[row] for row in order]] for name, column in columns.items()}
        (passages,) = read_answer({"ids": [ids], **ordered}, facts.metric)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StoreError(str(malformed(facts.name))) from error
    return list(passages), vectors
