"""A collection of a Chroma server, read a page at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast, get_args

import numpy as np

from searchr1_async.errors import StoreError
from searchr1_async.search.dispatch import Capacity, Dispatcher
from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.opening import open_store
from searchr1_async.search.passage_embedding import PACING
from searchr1_async.search.sources.base import Block, Metric, SourceFacts
from searchr1_async.search.sources.named import named_embedder
from searchr1_async.search.stores.chroma import RemoteChroma
from searchr1_async.search.stores.chroma.faults import malformed
from searchr1_async.search.stores.chroma.layout import CollectionModel, read_answer
from searchr1_async.search.stores.chroma.server import ServerDatabase
from searchr1_async.threads import in_thread

_INCLUDE = ("documents", "metadatas", "embeddings")


class ChromaServer:
    """The rows of a collection of a Chroma server, in the server's order. Nobody may write to the collection meanwhile.

    ::

        source = ChromaServer("localhost", 8000, "wiki_embeddings", embedder="gemini-embedding-001")

    Args:
        host: name or address, or a whole URL; this and what follows as
            :class:`~searchr1_async.search.stores.chroma.remote.RemoteChroma` takes it.
        port: TCP port.
        collection: its name.
        embedder: what made the vectors, for whoever searches the index; None where that is not known.
        options: ``ssl``, ``headers``, ``token``, ``tenant``, ``database`` and ``timeout``.

    Raises:
        StoreError: a collection name that Chroma does not take.
        ConfigurationError: an address or a token that cannot be one.
        EmbeddingError: no such embedder.
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
        """A collection of Chroma Cloud; ``options`` as :meth:`RemoteChroma.cloud` takes them.

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
            count = int(await self._patiently(count=True))
            if not count or model.dimension is None:
                raise StoreError(f"{store.name} holds no passages")
            if model.space not in get_args(Metric):
                raise StoreError(f"{store.name} measures distance by {model.space!r}, which is not known here")
            metric = cast(Metric, model.space)
            fingerprint = f"chroma-{model.id}-{count}-{metric}"
            self._facts = SourceFacts(store.name, fingerprint, count, model.dimension, metric, *self._embedder)
        return self._facts

    async def blocks(self, start: int) -> AsyncIterator[Block]:
        """See :meth:`~searchr1_async.search.sources.base.VectorSource.blocks`."""
        if (facts := self._facts) is None:
            raise StoreError(f"{self._store.name} is not open")
        while start < facts.count:
            answer = await self._patiently(offset=start)
            block = await in_thread(lambda answer=answer: _block(facts, answer))
            if not block[0]:
                raise StoreError(f"{facts.name} ends at row {start:,} of {facts.count:,}: it has changed since")
            start += len(block[0])
            yield block

    async def kept(self, rows: int) -> None:
        """Nothing is remembered of them."""

    async def aclose(self) -> None:
        self._facts = None
        await self._store.aclose()

    async def _patiently(self, *, count: bool = False, offset: int = 0) -> Any:
        """One request, tried again as others are."""

        async def send(_: Sequence[None]) -> Sequence[Any]:
            return [await (self._store.count() if count else self._store.rows(offset))]

        once: Dispatcher[str, None, Any] = Dispatcher(
            send, name=self._store.name, capacity=lambda: Capacity(1, 1), pacing=PACING, failure=StoreError
        )
        return (await once.fetch({"once": None}))["once"]


class _Reader(RemoteChroma):
    """The store's connections, asked for rows."""

    @property
    def model(self) -> CollectionModel:
        if self._model is None:
            raise StoreError(f"{self.name} is not open")
        return self._model

    async def rows(self, offset: int) -> Mapping[str, Any]:
        """A page of rows, in the order of their insertion.

        By offset, though the server then counts its way there: MEASURED
        """
        server = cast(ServerDatabase, self._database)
        asked = {"limit": self._page, "offset": offset, "include": _INCLUDE}

        async def ask(model: CollectionModel) -> Any:
            return await server._request("POST", await server._of(model.id, "get"), asked)

        answer = await self._ask_for_good(ask)
        return answer if isinstance(answer, dict) else {}


def _block(facts: SourceFacts, answer: Mapping[str, Any]) -> Block:
    try:
        ids = answer["ids"]
        columns = {name: [answer.get(name) or [None] * len(ids)] for name in ("documents", "metadatas")}
        (passages,) = read_answer({"ids": [ids], **columns}, facts.metric)
        vectors = np.array(answer["embeddings"], np.float32).reshape(len(ids), facts.dimension)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(str(malformed(facts.name))) from error
    return list(passages), vectors
