"""How passages are stored in a Chroma collection: settings, columns written, and answers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from searchr1_async.boundary.tables import name_text
from searchr1_async.data.layouts import split_contents
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Found

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
