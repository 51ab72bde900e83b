"""How passages lie in a Chroma collection: its name and settings, the columns that go in, the answers that come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from searchr1_async.boundary.cells import name_text
from searchr1_async.data.layouts import split_contents
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Found

INCLUDE = ("documents", "metadatas", "distances")
"""The columns asked for with every query; the ids come anyway."""

# Chroma's defaults (16 neighbours, 100 candidates) lose passages whose vectors lie about equally far from all others: of 50
# such, some were not found by their own words in half of the builds; with these, all are.
NEW_COLLECTION: Mapping[str, Mapping[str, str | int]] = {
    "hnsw": {"space": "cosine", "max_neighbors": 32, "ef_construction": 200, "ef_search": 200}
}
"""The settings of a collection that is made here."""


@dataclass(frozen=True, slots=True)
class CollectionModel:
    """What Chroma says of a collection."""

    id: str
    """Chroma's own; a collection that is deleted and made anew gets another one."""
    dimension: int | None
    """Numbers a vector; None while it is empty."""
    space: str
    """The distance it measures: ``"l2"`` (squared), ``"cosine"`` or ``"ip"``."""

    @classmethod
    def of(
        cls,
        own_id: object,
        dimension: object,
        configuration: Mapping[str, Any] | None,
        metadata: Mapping[str, Any] | None,
    ) -> CollectionModel:
        """From the fields of Chroma's answer.

        Of a collection that was made by a version before 1.0 Chroma says ``"l2"`` here, whatever it measures: the distance of
        such a one is in its metadata.
        """
        space = space_of({}, {}, configuration or {})
        if space == "l2":
            space = space_of({}, metadata or {}, {})
        return cls(str(own_id), int(dimension) if isinstance(dimension, int) else None, space)


def space_of(schema: Mapping[str, Any], metadata: Mapping[str, Any], configuration: Mapping[str, Any]) -> str:
    """The distance that a collection measures, as its version wrote it down; ``"l2"``, Chroma's default, where nothing says it.

    Newer versions keep a schema, which decides. Before it the metadata did, beside which the configuration of 0.5 says ``"l2"``
    in any case.
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
    """Refuses what Chroma would refuse later.

    Raises:
        StoreError: not 3 to 512 characters of ``a-zA-Z0-9._-`` with a letter or digit at both ends.
    """
    allowed = name.isascii() and all(character.isalnum() or character in "._-" for character in name)
    if not (3 <= len(name) <= 512 and allowed and name[0].isalnum() and name[-1].isalnum()):
        raise StoreError(
            f"Chroma takes no collection name {name!r}: 3 to 512 characters of a-z, A-Z, 0-9, '.', '_' and '-', "
            "with a letter or digit at both ends"
        )


def columns_of(passages: Sequence[Passage], vectors: Vectors) -> dict[str, Any]:
    """What goes in; of passages with the same id the last one, as if they had been put in one after another."""
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
    """Chroma's columns as passages.

    The title is the one in the metadata. A layout without it may hold the title as the document's first line, in
    quotes (that of the wiki-18 corpus): then the line is cut from the text.

    ``Passage.score`` is the cosine similarity where the vectors are of length 1, or the distance is ``"cosine"``. For
    vectors of other lengths it is only a number that falls as the distance grows: ``1 - d/2`` of the squared distance
    ``d`` for ``"l2"`` (without a lower bound), the inner product for ``"ip"``.

    Raises:
        KeyError, TypeError, ValueError: it is no answer to a query.
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
    """From Chroma's distance: squared for ``l2``, one minus the product otherwise."""
    if distance is None:
        return 0.0
    return 1.0 - float(distance) / 2 if space == "l2" else 1.0 - float(distance)
