"""What all Chroma stores share: how passages are stored in a collection, which is looked up again if it was recreated."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import anyio
import numpy as np

from searchr1_async.boundary.tables import name_text
from searchr1_async.data.layouts import split_contents
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import MissingCollection, RefusedInput, malformed
from searchr1_async.search.stores.vector_store import Found

INCLUDE = ("documents", "metadatas", "distances")
"""Columns requested with each query; ids are always returned."""

# Chroma's defaults (16 neighbours, 100 candidates) lose passages whose vectors are about equally far from all others.
NEW_COLLECTION: Mapping[str, Mapping[str, str | int]] = {
    "hnsw": {"space": "cosine", "max_neighbors": 32, "ef_construction": 200, "ef_search": 200}
}
"""Settings of collections created here."""

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


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
    def of(
        cls,
        own_id: object,
        dimension: object,
        configuration: Mapping[str, Any] | None,
        metadata: Mapping[str, Any] | None,
    ) -> CollectionModel:
        """From the fields of Chroma's answer.

        For a collection made before 1.0, Chroma always reports ``"l2"``; its real distance is in the metadata.
        """
        space = space_of({}, {}, configuration or {})
        if space == "l2":
            space = space_of({}, metadata or {}, {})
        return cls(str(own_id), int(dimension) if isinstance(dimension, int) else None, space)


def space_of(schema: Mapping[str, Any], metadata: Mapping[str, Any], configuration: Mapping[str, Any]) -> str:
    """The distance of a collection, as its Chroma version recorded it; ``"l2"``, Chroma's default, if nothing states it.

    Newer versions keep a schema, which takes precedence. Earlier ones use the metadata; 0.5's configuration always says ``"l2"``.
    """
    found = (
        _within(schema, "keys", "#embedding", "float_list", "vector_index", "config", "space"),
        metadata.get("hnsw:space"),
        _within(configuration, "hnsw", "space"),
        _within(configuration, "spann", "space"),
        _within(configuration, "hnsw_configuration", "space"),
    )
    return str(next((space for space in found if space), "l2"))


def _within(values: Any, *path: str) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def check_collection_name(name: str) -> None:
    """Checks a name by Chroma's rules.

    Raises:
        StoreError: not 3 to 512 characters of ``a-zA-Z0-9._-`` with a letter or digit at both ends.
    """
    allowed = name.isascii() and all(character.isalnum() or character in "._-" for character in name)
    if not (3 <= len(name) <= 512 and allowed and name[0].isalnum() and name[-1].isalnum()):
        raise StoreError(
            f"{name!r} is not a valid Chroma collection name: use 3 to 512 characters of a-z, A-Z, 0-9, '.', '_' and '-', "
            "with a letter or digit at both ends"
        )


def columns_of(passages: Sequence[Passage], vectors: Vectors) -> dict[str, Any]:
    """Columns for an upsert. The last passage of an id wins."""
    rows = {passage.id: row for row, passage in enumerate(passages)}
    if len(rows) < len(passages):
        passages, vectors = [passages[row] for row in rows.values()], vectors[list(rows.values())]
    return {
        "ids": [passage.id for passage in passages],
        "documents": [passage.text for passage in passages],
        "metadatas": [{"title": passage.title} for passage in passages],
        "embeddings": np.ascontiguousarray(vectors, dtype=np.float32),
    }


def read_answer(answer: Mapping[str, Any], space: str) -> Found:
    """Converts Chroma's columns to passages.

    The title comes from the metadata. Without one, a quoted first line of the document (wiki-18's layout) is the title, and is
    removed from the text.

    ``Passage.score`` is the cosine similarity for unit vectors or ``"cosine"``. Otherwise it only decreases with distance:
    ``1 - d/2`` of the squared distance ``d`` for ``"l2"`` (unbounded below), the inner product for ``"ip"``.

    Raises:
        KeyError, TypeError, ValueError: not an answer to a query.
    """
    ids = answer["ids"]
    documents = answer.get("documents") or [[None] * len(row) for row in ids]
    metadatas = answer.get("metadatas") or [[None] * len(row) for row in ids]
    distances = answer.get("distances") or [[None] * len(row) for row in ids]
    return tuple(
        tuple(
            _passage(str(own_id), document or "", metadata or {}, _similarity(distance, space))
            for own_id, document, metadata, distance in zip(*row, strict=True)
        )
        for row in zip(ids, documents, metadatas, distances, strict=True)
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


class Database(Protocol):
    """A Chroma database, in a folder or on a server. Each call sends one request and does not retry.

    All calls raise PassingFault, RefusedInput or StoreError; those with a collection id also MissingCollection.
    """

    @property
    def is_open(self) -> bool:
        """Whether it is usable from the running event loop."""
        ...

    async def open(self) -> None:
        """Prepares; sends no request."""
        ...

    async def look_up(self, collection: str) -> CollectionModel:
        """Finds the collection by name."""
        ...

    async def query(self, collection_id: str, vectors: Vectors, n_results: int) -> Mapping[str, Any]:
        """The columns of :data:`~searchr1_async.search.stores.chroma.INCLUDE`, and ids, nearest first."""
        ...

    async def upsert(self, collection_id: str, columns: Mapping[str, Any]) -> None:
        """Adds rows, replacing those with the same id."""
        ...

    async def existing(self, collection_id: str, ids: Sequence[str]) -> Sequence[str]:
        """The given ids that exist."""
        ...

    async def count(self, collection_id: str) -> int:
        """Rows of the collection."""
        ...

    async def aclose(self) -> None:
        """Releases everything. May be opened again."""
        ...


class ChromaStore:
    """One collection, as a :class:`~searchr1_async.search.stores.vector_store.Store`.

    Args:
        name: location, for messages.
        database: holds the collection.
        collection: collection name.
        page: maximum rows per write or lookup request.

    Raises:
        StoreError: Chroma does not accept the collection name.
    """

    def __init__(self, name: str, database: Database, collection: str, page: int) -> None:
        check_collection_name(collection)
        self._name = name
        self._database = database
        self._collection_name = collection
        self._page = page
        self._model: CollectionModel | None = None
        self._content: str | None = None
        self._looking_up = anyio.Lock()

    @property
    def name(self) -> str:
        return self._name

    @property
    def fingerprint(self) -> str:
        """The collection's id with its passage count when last counted, at least at opening.

        It changes when the collection is recreated or grows, but not when another process replaces rows one for one.

        Raises:
            StoreError: the store is not open.
        """
        if self._content is None:
            raise StoreError(f"{self.name} is not open")
        return self._content

    @property
    def dimension(self) -> int | None:
        return self._model.dimension if self._model is not None else None

    async def open(self) -> None:
        if self._model is not None and self._database.is_open:
            return
        self._forget()
        self._looking_up = anyio.Lock()  # locks belong to an event loop
        try:
            await self._database.open()
            await self._look_up_again(None)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        if not len(vectors):
            return ()
        if not np.isfinite(vectors).all():
            raise RefusedInput(f"{self.name}: a query vector has non-finite values")
        answer, model = await self._ask(lambda model: self._query(model, vectors, n_results))
        try:
            found = read_answer(answer, model.space)
        except (KeyError, TypeError, ValueError) as error:
            raise malformed(self.name) from error
        if len(found) != len(vectors):
            raise malformed(self.name)
        return found

    async def _query(self, model: CollectionModel, vectors: Vectors, n_results: int) -> Any:
        return await self._database.query(model.id, vectors, n_results), model

    async def add(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        if len(passages) != len(vectors):
            raise StoreError(f"{self.name}: {len(vectors)} vectors for {len(passages)} passages")
        for start in range(0, len(passages), self._page):
            part = slice(start, start + self._page)
            columns = columns_of(passages[part], vectors[part])
            await self._ask_for_good(lambda model, columns=columns: self._database.upsert(model.id, columns))
            self._grew(vectors.shape[1])

    async def count(self) -> int:
        async def ask(model: CollectionModel) -> int:
            count = await self._database.count(model.id)
            self._content = f"{model.id}-{count}"
            return count

        return await self._ask_for_good(ask)

    async def missing(self, ids: Sequence[str]) -> frozenset[str]:
        wanted = list(dict.fromkeys(ids))
        missing = set(wanted)
        for start in range(0, len(wanted), self._page):
            page = wanted[start : start + self._page]
            missing.difference_update(
                await self._ask_for_good(lambda model, page=page: self._database.existing(model.id, page))
            )
        return frozenset(missing)

    async def aclose(self) -> None:
        self._forget()
        await self._database.aclose()

    def _forget(self) -> None:
        self._model = self._content = None

    def _grew(self, dimension: int) -> None:
        """Invalidates the dimension and fingerprint after a write."""
        if self._model is not None:
            if self._model.dimension is None:
                self._model = CollectionModel(self._model.id, dimension, self._model.space)
            self._content = f"{self._model.id}-{uuid4().hex}"

    async def _ask(self, request: Callable[[CollectionModel], Awaitable[Result]]) -> Result:
        """Sends a request; once more if the collection was recreated."""
        model = self._model
        if model is None:
            raise StoreError(f"{self.name} is not open")
        try:
            return await request(model)
        except MissingCollection:
            model = await self._look_up_again(model)
            return await request(model)

    async def _ask_for_good(self, request: Callable[[CollectionModel], Awaitable[Result]]) -> Result:
        try:
            return await self._ask(request)
        except RefusedInput as error:
            raise StoreError(str(error)) from error

    async def _look_up_again(self, known: CollectionModel | None) -> CollectionModel:
        """Looks the collection up, once for all concurrent requests that found it missing."""
        async with self._looking_up:
            if self._model is not None and self._model is not known:
                return self._model
            try:
                model = await self._database.look_up(self._collection_name)
                count = await self._database.count(model.id)
            except RefusedInput as error:
                raise StoreError(str(error), is_fatal=True) from error
            if known is not None:
                logger.info("%s was recreated: looked it up again", self.name)
            self._model, self._content = model, f"{model.id}-{count}"
            return model
