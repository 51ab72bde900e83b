"""A Chroma collection in a folder, read in pages without opening Chroma, which would hold all of it in memory."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Embedder, Vectors
from searchr1_async.search.sources.base import Block, Metric, SourceFacts
from searchr1_async.search.sources.hnsw_segment import BrokenSegmentError, HnswSegment, stacked
from searchr1_async.search.sources.named import named_embedder
from searchr1_async.search.stores.chroma.layout import read_answer
from searchr1_async.threads import in_thread

PAGE = 8_192
_VECTOR_SEGMENT = "urn:chroma:segment/vector/hnsw-local-persisted"
_METADATA_SEGMENT = "urn:chroma:segment/metadata/sqlite"
_ADD, _UPDATE, _UPSERT, _DELETE = range(4)
"""Operations of the write-ahead log."""
# `NOT INDEXED`: by the row's number, where SQLite would rather sort all of them after a look into the index of ids.
_PAGE_QUERY = """
SELECT e.id, e.embedding_id, d.string_value AS document, t.id IS NOT NULL AS is_titled,
       coalesce(t.string_value, t.int_value, t.float_value) AS title
FROM embeddings e NOT INDEXED
LEFT JOIN embedding_metadata d ON d.id = e.id AND d.key = 'chroma:document'
LEFT JOIN embedding_metadata t ON t.id = e.id AND t.key = 'title'
WHERE e.segment_id = ? AND e.id > ? ORDER BY e.id LIMIT ?
"""


class ChromaFolder:
    """The rows of a Chroma collection in a folder, in the order in which they were put in.

    Chroma itself holds every vector in memory, 78 GB for the prebuilt index of Wikipedia; here a page is held, and 28 bytes a
    row to find its vector. Of a collection with cosine distance vectors are of length 1. Nobody may write to the folder
    meanwhile. Written for the folders of chromadb 0.5 to 1.5.

    Args:
        path: the folder, with ``chroma.sqlite3`` in it.
        collection: its name; None: the only one there.
        embedder: what made the vectors, for whoever searches the index; None where that is not known.

    Raises:
        EmbeddingError: no such embedder.
    """

    def __init__(
        self, path: str | Path, collection: str | None = None, embedder: str | Path | Embedder | None = None
    ) -> None:
        self._folder = Path(path).expanduser().absolute()
        self._collection = collection
        self._embedder = named_embedder(embedder)
        self._opened: _Opened | None = None

    async def open(self) -> SourceFacts:
        if self._opened is None:
            self._opened = await in_thread(lambda: _Opened(self._folder, self._collection, self._embedder))
        return self._opened.facts

    async def blocks(self, start: int) -> AsyncIterator[Block]:
        """See :meth:`~searchr1_async.search.sources.base.VectorSource.blocks`."""
        if (opened := self._opened) is None:
            raise StoreError(f"{self._folder} is not open")
        after = await in_thread(lambda: opened.number_before(start))
        while page := await in_thread(lambda after=after: opened.page(after)):
            block, after = page
            yield block

    async def kept(self, rows: int) -> None:
        """Nothing is remembered of them."""

    async def aclose(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            await in_thread(opened.close)


class _Opened:
    """What blocks, one call at a time, each in any thread."""

    def __init__(self, folder: Path, collection: str | None, embedder: tuple[str | None, str | None]) -> None:
        self._folder = folder
        path = folder / "chroma.sqlite3"
        if not path.is_file():
            raise StoreError(f"{folder} is no Chroma folder (no chroma.sqlite3): name the one that Chroma was given")
        with self._worded():
            self._database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, check_same_thread=False)
            self._database.row_factory = sqlite3.Row
            try:
                self._open(collection, embedder)
            except BaseException:
                self._database.close()
                raise

    def _open(self, name: str | None, embedder: tuple[str | None, str | None]) -> None:
        collection = self._find(name)
        self.name = f"Chroma collection {collection['name']!r} in {self._folder}"
        own_id, dimension = str(collection["id"]), collection["dimension"]
        found = self._all("SELECT id, type FROM segments WHERE collection = ?", own_id)
        segments = {row["type"]: str(row["id"]) for row in found}
        if set(segments) != {_VECTOR_SEGMENT, _METADATA_SEGMENT}:
            raise StoreError(
                f"{self.name} has a layout that is not known here (segments {', '.join(segments) or 'none'})"
            )
        self._metadata = segments[_METADATA_SEGMENT]
        ((count,),) = self._all("SELECT count(*) FROM embeddings WHERE segment_id = ?", self._metadata)
        if not count or not dimension:
            raise StoreError(f"{self.name} holds no passages")
        self._dimension = int(dimension)
        self._topic = f"%/{own_id}"
        last = self._read_segment(segments[_VECTOR_SEGMENT])
        metric = self._metric(collection)
        self._is_cosine = metric == "cosine"
        fingerprint = f"chroma-{own_id}-{count}-{last}-{metric}"
        self.facts = SourceFacts(self.name, fingerprint, count, self._dimension, metric, *embedder)

    def _find(self, name: str | None) -> sqlite3.Row:
        rows = self._all("SELECT * FROM collections ORDER BY name")
        found = [row for row in rows if name in (None, row["name"])]
        if len(found) == 1:
            return found[0]
        there = ", ".join(sorted({str(row["name"]) for row in rows})) or "none"
        wanted = "holds several collections" if name is None else f"holds {len(found) or 'no'} collections {name!r}"
        raise StoreError(f"{self._folder} {wanted} (there are: {there}): name one that is there once")

    def _metric(self, collection: sqlite3.Row) -> Metric:
        """Newer versions keep a schema; before it the metadata won, beside which the configuration of 0.5 says ``l2`` in any case."""
        query = "SELECT str_value FROM collection_metadata WHERE collection_id = ? AND key = 'hnsw:space'"
        in_metadata = next((row[0] for row in self._all(query, collection["id"])), None)
        columns = collection.keys()
        schema = _json(collection["schema_str"]) if "schema_str" in columns else {}
        configuration = _json(collection["config_json_str"]) if "config_json_str" in columns else {}
        space = (
            _within(schema, "keys", "#embedding", "float_list", "vector_index", "config", "space")
            or in_metadata
            or _within(configuration, "hnsw", "space")
            or _within(configuration, "hnsw_configuration", "space")
            or "l2"
        )
        if space not in get_args(Metric):
            raise StoreError(f"{self.name} measures distance by {space!r}, which is not known here")
        return space

    def _read_segment(self, own_id: str) -> int:
        """The HNSW files and what is in the log only; the number of the last change."""
        folder = self._folder / own_id
        # Before the first 1,000 changes, by default, all is in the log only, though the other files lie there already.
        is_written = (folder / "index_metadata.pickle").exists()
        self._segment = HnswSegment(folder, self._dimension) if is_written else None
        changes = {str(row[0]): _number(row[1]) for row in self._all("SELECT segment_id, seq_id FROM max_seq_id")}
        ((logged,),) = self._all("SELECT max(seq_id) FROM embeddings_queue WHERE topic LIKE ?", self._topic)
        passages = changes.get(self._metadata, 0)
        if (logged or 0) > passages:
            raise StoreError(
                f"{self.name} was left while it was written (its log is ahead of its passages): open it once with Chroma, "
                "and ask for its count()"
            )
        if self._segment is None:
            vectors = -1
        else:
            vectors = changes.get(own_id, self._segment.labels.max_seq_id)
            if vectors is None:
                raise StoreError(
                    f"{self.name} does not say how far its vectors were written: its layout is not known here"
                )
        self._logged = self._replayed(vectors)
        return max(passages, vectors, logged or 0)

    def _replayed(self, after: int) -> dict[str, int | None]:
        """Where in the log the vector of an id is, of the ids that were changed since the HNSW files; None: deleted."""
        where: dict[str, int | None] = {}
        query = (
            "SELECT seq_id, operation, id, vector IS NOT NULL FROM embeddings_queue "
            "WHERE seq_id > ? AND topic LIKE ? ORDER BY seq_id"
        )
        for change, operation, own_id, has_vector in self._database.execute(query, (after, self._topic)):
            if operation == _DELETE:
                where[own_id] = None
                continue
            is_there = where[own_id] is not None if own_id in where else self._is_in_segment(own_id)
            # As Chroma does it: what is added again stays as it was, and what is not there is not updated.
            if has_vector and (operation == _UPSERT or is_there == (operation == _UPDATE)):
                where[own_id] = int(change)
        return where

    def _is_in_segment(self, own_id: str) -> bool:
        return self._segment is not None and bool(self._segment.labels.of([own_id])[0] >= 0)

    def number_before(self, start: int) -> int:
        """Of the row in the database after which row ``start`` comes."""
        if not start:
            return -1
        query = "SELECT id FROM embeddings NOT INDEXED WHERE segment_id = ? ORDER BY id LIMIT 1 OFFSET ?"
        with self._worded():
            found = self._all(query, self._metadata, start - 1)
        if not found:
            raise StoreError(f"{self.name} holds no {start:,} passages any more: it has changed since")
        return int(found[0][0])

    def page(self, after: int) -> tuple[Block, int] | None:
        """The rows after one, and the number of the last of them; None at the end."""
        with self._worded():
            rows = self._all(_PAGE_QUERY, self._metadata, after, PAGE)
            if not rows:
                return None
            ids = [str(row["embedding_id"]) for row in rows]
            metadata: list[Mapping[str, Any]] = [{"title": row["title"]} if row["is_titled"] else {} for row in rows]
            answer = {"ids": [ids], "documents": [[row["document"] for row in rows]], "metadatas": [metadata]}
            (passages,) = read_answer(answer, self.facts.metric)
            return (list(passages), self._vectors(ids)), int(rows[-1]["id"])

    def _vectors(self, ids: Sequence[str]) -> Vectors:
        found = np.empty((len(ids), self._dimension), np.float32)
        logged = [(row, self._logged[own_id]) for row, own_id in enumerate(ids) if own_id in self._logged]
        in_files = [row for row, own_id in enumerate(ids) if own_id not in self._logged]
        lost = next((ids[row] for row, change in logged if change is None), None)
        if logged and lost is None:
            query = "SELECT vector, encoding FROM embeddings_queue WHERE seq_id = ?"
            read = [self._all(query, change)[0] for _, change in logged]
            if other := {row["encoding"] for row in read} - {"FLOAT32"}:
                raise StoreError(
                    f"{self.name} holds vectors of {', '.join(map(str, other))} in its log: not known here"
                )
            vectors = stacked((row["vector"] for row in read), self._dimension)
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
            raise StoreError(f"{self.name} holds no vector of the passage {lost!r}: it is broken")
        return found

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        return self._database.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _worded(self):
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"{self._folder} cannot be read ({error}): another program writes to it, or its layout is not known here"
            ) from error
        except (sqlite3.Error, BrokenSegmentError, OSError) as error:
            raise StoreError(f"{self._folder} cannot be read: {error}") from error

    def close(self) -> None:
        self._segment = None
        self._database.close()


def _number(change: int | bytes) -> int:
    """Of a change; older versions keep it as bytes."""
    return int.from_bytes(change, "big") if isinstance(change, bytes) else int(change)


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}


def _within(values: Any, *path: str) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values
