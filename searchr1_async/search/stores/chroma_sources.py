"""Chroma collections as sources of vectors, read in pages: of a folder, without Chroma, or of a server."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, cast, get_args

import numpy as np

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.waits import in_thread
from searchr1_async.errors import StoreError
from searchr1_async.search.dispatch import with_retries
from searchr1_async.search.embedders import Embedder, Vectors
from searchr1_async.search.faults import malformed
from searchr1_async.search.passage_embedding import PACING
from searchr1_async.search.stores.chroma import CollectionModel, read_answer
from searchr1_async.search.stores.chroma_files import (
    LABELS_NAME,
    BrokenSegmentError,
    HnswSegment,
    check_segment,
    stacked,
)
from searchr1_async.search.stores.chroma_server import PAGE, RemoteChroma, ServerDatabase
from searchr1_async.search.stores.chroma_tables import DATABASE_NAME, ChromaTables
from searchr1_async.search.stores.sources import Block, SourceFacts, named_embedder
from searchr1_async.search.stores.vector_store import Metric, open_store

FOLDER_PAGE = 8_192
# `NOT INDEXED`: scan by row number; SQLite would otherwise use the id index and sort all rows.
_PAGE_QUERY = """
SELECT e.id, e.embedding_id, d.string_value AS document, t.id IS NOT NULL AS is_titled,
       coalesce(t.string_value, t.int_value, t.float_value) AS title
FROM embeddings e NOT INDEXED
LEFT JOIN embedding_metadata d ON d.id = e.id AND d.key = 'chroma:document'
LEFT JOIN embedding_metadata t ON t.id = e.id AND t.key = 'title'
WHERE e.segment_id = ? AND e.id > ? ORDER BY e.id LIMIT ?
"""

Result = TypeVar("Result")
LISTED = 50_000
"""Ids per request; Chroma Cloud limits it to a page."""
_INCLUDE = ("documents", "metadatas", "embeddings")


class ChromaFolder:
    """The rows of a Chroma collection in a folder, in insertion order.

    Memory: one page, plus 28 bytes per row to locate its vector; Chroma would load all vectors (78 GB for the prebuilt Wikipedia
    index). Vectors of cosine collections have length 1. Nothing may write to the folder meanwhile. Supports folders of chromadb
    0.5 to 1.5.

    Args:
        path: the folder that contains ``chroma.sqlite3``.
        collection: collection name; None if there is only one.
        embedder: the embedder of the vectors, recorded in the index; None if unknown.

    Raises:
        EmbeddingError: the embedder does not exist.
    """

    def __init__(
        self, path: str | Path, collection: str | None = None, embedder: str | Path | Embedder | None = None
    ) -> None:
        self._folder = absolute_path(path, "path")
        self._collection = collection
        self._embedder = named_embedder(embedder)
        self._opened: _Opened | None = None

    async def open(self) -> SourceFacts:
        if self._opened is None:
            self._opened = await in_thread(lambda: _Opened(self._folder, self._collection, self._embedder))
        return self._opened.facts

    async def blocks(self, start: int) -> AsyncIterator[Block]:
        """See :meth:`~searchr1_async.search.stores.sources.VectorSource.blocks`."""
        if (opened := self._opened) is None:
            raise StoreError(f"{self._folder} is not open")
        after = await in_thread(lambda: opened.number_before(start))
        while page := await in_thread(lambda after=after: opened.page(after)):
            block, after = page
            yield block

    async def kept(self, rows: int) -> None:
        """Nothing to drop."""

    async def aclose(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            await in_thread(opened.close)


class _Opened:
    """The blocking part. Thread-safe, one call at a time."""

    def __init__(self, folder: Path, collection: str | None, embedder: tuple[str | None, str | None]) -> None:
        self._folder = folder
        if not (folder / DATABASE_NAME).is_file():
            raise StoreError(f"{folder} is not a Chroma folder (no {DATABASE_NAME}): name the folder that Chroma uses")
        with self._store_errors():
            self._tables = ChromaTables(folder, collection)
            try:
                self._open(embedder)
            except BaseException:
                self._tables.close()
                raise

    def _open(self, embedder: tuple[str | None, str | None]) -> None:
        tables = self._tables
        self.name = tables.name
        if not tables.count or not tables.dimension:
            raise StoreError(f"{self.name} holds no passages")
        last = self._read_segment()
        metric = tables.space
        if metric not in get_args(Metric):
            raise StoreError(f"{self.name} uses the distance {metric!r}, which is not supported")
        metric = cast(Metric, metric)
        self._is_cosine = metric == "cosine"
        fingerprint = f"chroma-{tables.id}-{tables.count}-{last}-{metric}"
        self.facts = SourceFacts(self.name, fingerprint, tables.count, tables.dimension, metric, *embedder)

    def _read_segment(self) -> int:
        """Opens the HNSW files and reads the log; returns the number of the last change."""
        tables = self._tables
        is_written = (tables.segment_folder / LABELS_NAME).exists()
        self._segment: HnswSegment | None = None
        if is_written:
            is_cosine = tables.space == "cosine"
            self._segment = check_segment(tables.segment_folder, tables.dimension, is_cosine=is_cosine)
        logged, passages = tables.logged, tables.passages_changed
        if logged > passages:
            raise StoreError(
                f"{self.name} was interrupted during a write (its log is ahead of its passages): open it once with Chroma "
                "and call its count()"
            )
        if self._segment is None:
            vectors = -1
        else:
            vectors = self._segment.labels.max_seq_id if tables.vectors_changed is None else tables.vectors_changed
            if vectors is None:
                raise StoreError(
                    f"{self.name} does not record how far its vectors were written: its layout is not supported"
                )
        self._logged = tables.replayed(vectors, self._is_in_segment)
        return max(passages, vectors, logged)

    def _is_in_segment(self, own_id: str) -> bool:
        return self._segment is not None and bool(self._segment.labels.of([own_id])[0] >= 0)

    def number_before(self, start: int) -> int:
        """The database id of the row before row ``start``."""
        if not start:
            return -1
        query = "SELECT id FROM embeddings NOT INDEXED WHERE segment_id = ? ORDER BY id LIMIT 1 OFFSET ?"
        with self._store_errors():
            found = self._tables.all(query, self._tables.metadata_segment, start - 1)
        if not found:
            raise StoreError(f"{self.name} no longer holds {start:,} passages: it has changed since")
        return int(found[0][0])

    def page(self, after: int) -> tuple[Block, int] | None:
        """The rows after a database id, and the id of the last of them; None at the end."""
        with self._store_errors():
            rows = self._tables.all(_PAGE_QUERY, self._tables.metadata_segment, after, FOLDER_PAGE)
            if not rows:
                return None
            ids = [str(row["embedding_id"]) for row in rows]
            metadata: list[Mapping[str, Any]] = [{"title": row["title"]} if row["is_titled"] else {} for row in rows]
            answer = {"ids": [ids], "documents": [[row["document"] for row in rows]], "metadatas": [metadata]}
            (passages,) = read_answer(answer, self.facts.metric)
            return (list(passages), self._vectors(ids)), int(rows[-1]["id"])

    def _vectors(self, ids: Sequence[str]) -> Vectors:
        found = np.empty((len(ids), self.facts.dimension), np.float32)
        logged = [(row, self._logged[own_id]) for row, own_id in enumerate(ids) if own_id in self._logged]
        in_files = [row for row, own_id in enumerate(ids) if own_id not in self._logged]
        lost = next((ids[row] for row, change in logged if change is None), None)
        if logged and lost is None:
            query = "SELECT vector, encoding FROM embeddings_queue WHERE seq_id = ?"
            read = [self._tables.all(query, change)[0] for _, change in logged]
            if other := {row["encoding"] for row in read} - {"FLOAT32"}:
                raise StoreError(
                    f"{self.name} has vectors encoded as {', '.join(map(str, other))} in its log, which is not supported"
                )
            vectors = stacked((row["vector"] for row in read), self.facts.dimension)
            if self._is_cosine:
                vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
            found[[row for row, _ in logged]] = vectors
        if in_files and lost is None:
            own = [ids[row] for row in in_files]
            labels = np.full(len(own), -1) if self._segment is None else self._segment.labels.of(own)
            if self._segment is not None and (labels >= 0).all():
                found[in_files] = self._segment.vectors(labels)
            else:
                lost = own[int(np.argmin(labels))]
        if lost is not None:
            raise StoreError(f"{self.name} has no vector for the passage {lost!r}: it is corrupt")
        return found

    @contextlib.contextmanager
    def _store_errors(self):
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"{self._folder} cannot be read ({error}): another program is writing to it, or its layout is not supported"
            ) from error
        except (sqlite3.Error, BrokenSegmentError, OSError) as error:
            raise StoreError(f"{self._folder} cannot be read: {error}") from error

    def close(self) -> None:
        self._segment = None
        self._tables.close()


class ChromaServer:
    """The rows of a collection of a Chroma server, in the server's order. Nothing may write to the collection meanwhile.

    ::

        source = ChromaServer("localhost", 8000, "wiki_embeddings", embedder="gemini-embedding-001")

    Args:
        host: as for :class:`~searchr1_async.search.stores.chroma_server.RemoteChroma`.
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
        """See :meth:`~searchr1_async.search.stores.sources.VectorSource.blocks`."""
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
        return await with_retries(request, name=self._store.name, pacing=PACING, failure=StoreError)


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
