"""What all Chroma stores share: how passages are stored in a collection, and the calls of a store."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import anyio
import numpy as np

from searchr1_async.boundary.tables import name_text
from searchr1_async.data.corpus import split_contents
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import RefusedInput, malformed
from searchr1_async.search.stores.vector_store import Found

INCLUDE = ("documents", "metadatas", "distances")
"""Columns requested with each query; ids are always returned."""

# Chroma's defaults (16 neighbours, 100 candidates) lose passages whose vectors are about equally far from all others.
NEW_COLLECTION: Mapping[str, Mapping[str, str | int]] = {
    "hnsw": {"space": "cosine", "max_neighbors": 32, "ef_construction": 200, "ef_search": 200}
}
"""Settings of collections created here."""


@dataclass(frozen=True, slots=True)
class CollectionModel:
    """Chroma's description of a collection."""

    id: str
    """Chroma's id; a recreated collection gets another one."""
    dimension: int | None
    """Dimension of the vectors; None if empty."""
    space: str
    """Distance: ``"l2"`` (squared), ``"cosine"`` or ``"ip"``."""

    @classmethod
    def of(cls, own_id: object, dimension: object, configuration: object, metadata: object) -> CollectionModel:
        """From the fields of Chroma's answer."""
        space = space_of({}, metadata, configuration)
        return cls(str(own_id), int(dimension) if isinstance(dimension, int) else None, space)


def space_of(schema: object, metadata: object, configuration: object) -> str:
    """The distance of a collection, as its Chroma version recorded it; ``"l2"``, Chroma's default, if nothing states another one.

    Newer versions keep a schema. Earlier ones use the metadata, beside which their configuration always says ``"l2"``.
    """
    found = (
        _within(schema, "keys", "#embedding", "float_list", "vector_index", "config", "space"),
        _within(metadata, "hnsw:space"),
        _within(configuration, "hnsw", "space"),
        _within(configuration, "spann", "space"),
        _within(configuration, "hnsw_configuration", "space"),
    )
    return next((str(space) for space in found if space not in (None, "", "l2")), "l2")


def _within(values: Any, *path: str) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def check_collection_name(name: str) -> None:
    """Raises StoreError unless Chroma takes the name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,510}[A-Za-z0-9]", name):
        raise StoreError(
            f"{name!r} is not a valid Chroma collection name: use 3 to 512 characters of a-z, A-Z, 0-9, '.', '_' and '-', "
            "with a letter or digit at both ends"
        )


def columns_of(passages: Sequence[Passage], vectors: Vectors) -> dict[str, Any]:
    """Columns for an upsert. The last passage of an id wins."""
    rows = list({passage.id: row for row, passage in enumerate(passages)}.values())
    passages = [passages[row] for row in rows]
    return {
        "ids": [passage.id for passage in passages],
        "documents": [passage.text for passage in passages],
        "metadatas": [{"title": passage.title} for passage in passages],
        "embeddings": np.ascontiguousarray(vectors[rows], dtype=np.float32),
    }


def read_answer(answer: Mapping[str, Any], space: str) -> Found:
    """Converts Chroma's columns to passages. Raises KeyError, TypeError or ValueError if they are no answer to a query.

    The title comes from the metadata. Without one, a quoted first line of the document (wiki-18's layout) is the title, and is
    removed from the text. ``Passage.score`` is the cosine similarity for unit vectors or ``"cosine"``; otherwise ``1 - d/2`` of the
    squared distance ``d`` for ``"l2"`` (unbounded below), the inner product for ``"ip"``.
    """
    ids = answer["ids"]
    columns = [answer.get(name) or [[None] * len(row) for row in ids] for name in INCLUDE]
    return tuple(
        tuple(
            _passage(str(own_id), document or "", metadata or {}, _similarity(distance, space))
            for own_id, document, metadata, distance in zip(*row, strict=True)
        )
        for row in zip(ids, *columns, strict=True)
    )


def _passage(own_id: str, document: str, metadata: Mapping[str, Any], score: float) -> Passage:
    if "title" in metadata:
        return Passage(own_id, name_text(metadata["title"]) or "", document, score)
    title, text = split_contents(document, only_quoted=True)
    return Passage(own_id, title, text, score)


def _similarity(distance: float | None, space: str) -> float:
    """From Chroma's distance: squared for ``l2``, else one minus the product."""
    if distance is None:
        return 0.0
    return 1.0 - float(distance) / 2 if space == "l2" else 1.0 - float(distance)


class ChromaStore(ABC):
    """One collection, as a :class:`~searchr1_async.search.stores.vector_store.WritableStore`; subclasses send the requests.

    ``name`` is for messages; ``page`` is the most rows per write or lookup. Raises StoreError if Chroma does not take the collection's
    name.
    """

    max_queries: int
    max_requests: int

    def __init__(self, name: str, collection: str, page: int) -> None:
        check_collection_name(collection)
        self.name = name
        self._collection_name = collection
        self._page = page
        self._model: CollectionModel | None = None
        self._content = ""

    @property
    def fingerprint(self) -> str:
        """The collection's id with its passage count when last counted, at least at opening. Raises StoreError if it is not open.

        It changes when the collection is recreated or grows, but not when another process replaces rows one for one.
        """
        return f"{self.model.id}-{self._content}"

    @property
    def dimension(self) -> int | None:
        return self._model.dimension if self._model is not None else None

    @property
    def model(self) -> CollectionModel:
        """The open collection. Raises StoreError if the store is not open."""
        if self._model is None:
            raise StoreError(f"{self.name} is not open")
        return self._model

    async def open(self) -> None:
        if self._model is not None and self._is_connected():
            return
        try:
            with for_good(is_fatal=True):
                self._model = await self._connect()
            await self.count()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        if not len(vectors):
            return ()
        if not np.isfinite(vectors).all():
            raise RefusedInput(f"{self.name}: a query vector has non-finite values")
        model = self.model
        answer = await self._query(model.id, vectors, n_results)
        try:
            found = read_answer(answer, model.space)
        except (KeyError, TypeError, ValueError) as error:
            raise malformed(self.name) from error
        if len(found) != len(vectors):
            raise malformed(self.name)
        return found

    async def add(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        if len(passages) != len(vectors):
            raise StoreError(f"{self.name}: {len(vectors)} vectors for {len(passages)} passages")
        for start in range(0, len(passages), self._page):
            part = slice(start, start + self._page)
            with for_good():
                await self._upsert(self.model.id, columns_of(passages[part], vectors[part]))
            self._model, self._content = replace(self.model, dimension=vectors.shape[1]), uuid4().hex

    async def count(self) -> int:
        with for_good():
            count = await self._count(self.model.id)
        self._content = str(count)
        return count

    async def missing(self, ids: Sequence[str]) -> frozenset[str]:
        wanted = list(dict.fromkeys(ids))
        missing = set(wanted)
        for start in range(0, len(wanted), self._page):
            with for_good():
                missing.difference_update(await self._existing(self.model.id, wanted[start : start + self._page]))
        return frozenset(missing)

    async def aclose(self) -> None:
        self._model = None
        await self._disconnect()

    # Each of these sends at most one request without a retry, and raises PassingFault, RefusedInput or StoreError.

    @abstractmethod
    def _is_connected(self) -> bool:
        """Whether it is usable from the running event loop."""

    @abstractmethod
    async def _connect(self) -> CollectionModel:
        """Finds the collection by name."""

    @abstractmethod
    async def _query(self, collection: str, vectors: Vectors, n_results: int) -> Mapping[str, Any]:
        """The columns of :data:`INCLUDE`, and ids, nearest first."""

    @abstractmethod
    async def _upsert(self, collection: str, columns: Mapping[str, Any]) -> None: ...

    @abstractmethod
    async def _existing(self, collection: str, ids: Sequence[str]) -> Sequence[str]:
        """The given ids that exist."""

    @abstractmethod
    async def _count(self, collection: str) -> int: ...

    @abstractmethod
    async def _disconnect(self) -> None: ...


@contextmanager
def for_good(*, is_fatal: bool = False) -> Iterator[None]:
    """Requests without queries: nothing in them can be left out."""
    try:
        yield
    except RefusedInput as error:
        raise StoreError(str(error), is_fatal=is_fatal) from error
