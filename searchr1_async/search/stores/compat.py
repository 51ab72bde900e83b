"""Chroma's private files in a folder: SQLite tables, a pickle and HNSW rows, as chromadb 0.5 to 1.5 write them.

Chroma would load the vectors of the prebuilt Wikipedia index into 78 GB of memory; read here, they take about 30 bytes per row.
Checked with 0.5.23 and 1.5.9; anything else is refused. Other folders are read through a server: ``chroma run``, and ``ChromaServer``.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import pickletools
import sqlite3
import struct
from array import array
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio.from_thread
import numpy as np
import polars as pl
from numpy.typing import NDArray

from searchr1_async.boundary.waits import in_thread
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.chroma import read_answer, space_of
from searchr1_async.search.stores.sources import ROWS, Block, SourceFacts, metric_of, read_ahead

DATABASE_NAME = "chroma.sqlite3"
ROWS_NAME, HEADER_NAME, LABELS_NAME = "data_level0.bin", "header.bin", "index_metadata.pickle"
VECTOR_FILES = (HEADER_NAME, ROWS_NAME, "length.bin", "link_lists.bin", LABELS_NAME)
"""The files of a collection's vectors, in a folder of their own."""
_MIGRATIONS = {"sysdb": (6, 10), "metadb": (4, 6), "embeddings_queue": (1, 2)}
"""Lowest and highest numbers of the tables' layouts that are supported."""
_SEGMENTS = {"urn:chroma:segment/vector/hnsw-local-persisted", "urn:chroma:segment/metadata/sqlite"}
_ADD, _UPSERT = 0, 2  # operations of the write-ahead log; 1 is an update, 3 a deletion
_PASSAGES = """
SELECT e.embedding_id AS id, d.string_value AS document, t.id IS NOT NULL AS is_titled,
       coalesce(t.string_value, t.int_value, t.float_value) AS title
FROM embeddings e
LEFT JOIN embedding_metadata d ON d.id = e.id AND d.key = 'chroma:document'
LEFT JOIN embedding_metadata t ON t.id = e.id AND t.key = 'title'
WHERE e.segment_id = ? AND e.embedding_id IN (SELECT value FROM json_each(?))
"""
_HEADER = struct.Struct("<i6Q")
"""Version, offset of layer 0, capacity, rows, bytes per row, label offset and vector offset of a row."""


def _opened(folder: Path) -> sqlite3.Connection:
    database = sqlite3.connect(f"{(folder / DATABASE_NAME).as_uri()}?mode=ro", uri=True, check_same_thread=False)
    database.row_factory = sqlite3.Row
    return database


def collections_in(folder: Path) -> tuple[str, ...]:
    """The names of the collections of a Chroma folder; empty if its layout is not supported."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_opened(folder)) as database:
        return tuple(str(row["name"]) for row in database.execute("SELECT name FROM collections ORDER BY name"))
    return ()


def last_change(folder: Path, segment: str) -> int | None:
    """The number of the last change in the vector files of a segment; None if there is no record. Raises sqlite3.Error."""
    with contextlib.closing(_opened(folder)) as database:
        found = database.execute("SELECT seq_id FROM max_seq_id WHERE segment_id = ?", (segment,)).fetchone()
    if found is None:
        return None
    return int.from_bytes(found[0], "big") if isinstance(found[0], bytes) else int(found[0])  # 0.5 stores bytes


class FolderSource:
    """The rows of the only collection in a Chroma folder (absolute), in the order of its vector file, then those of the log alone.

    Nothing may write to the folder meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened = contextlib.ExitStack()

    async def open(self) -> SourceFacts:
        return await in_thread(self._open)

    def blocks(self, start: int) -> AsyncGenerator[Block]:
        """See :meth:`~searchr1_async.search.stores.sources.VectorSource.blocks`."""
        return read_ahead(self._rows(start))

    async def aclose(self) -> None:
        self._opened.close()

    def _open(self) -> SourceFacts:
        with self._store_errors():
            self._database = self._opened.enter_context(contextlib.closing(_opened(self._folder)))
            self._refuse_other_versions()
            collections = self._all("SELECT * FROM collections ORDER BY name")
            if len(collections) != 1:
                raise StoreError(f"{self._folder} holds {len(collections)} collections instead of one")
            self._name = f"Chroma collection {collections[0]['name']!r} in {self._folder}"
            return self._read(dict(collections[0]))

    def _refuse_other_versions(self) -> None:
        found = {row[0]: row[1] for row in self._all("SELECT dir, max(version) FROM migrations GROUP BY dir")}
        if not all(low <= found.get(name, 0) <= high for name, (low, high) in _MIGRATIONS.items()):
            layout = ", ".join(f"{name} {number}" for name, number in sorted(found.items()))
            raise StoreError(
                f"{self._folder} was not written by chromadb 0.5 to 1.5 (layout {layout}): serve it with its own version "
                "(chroma run --path …), and build from sr.search.ChromaServer"
            )

    def _read(self, collection: Mapping[str, Any]) -> SourceFacts:
        own_id, dimension = str(collection["id"]), int(collection["dimension"] or 0)
        found = {row[1]: str(row[0]) for row in self._all("SELECT id, type FROM segments WHERE collection = ?", own_id)}
        if set(found) != _SEGMENTS:
            raise StoreError(f"{self._name} has an unsupported layout (segments {', '.join(found) or 'none'})")
        self._passages, vectors = (found[kind] for kind in sorted(_SEGMENTS))
        ((count,),) = self._all("SELECT count(*) FROM embeddings WHERE segment_id = ?", self._passages)
        if not count or not dimension:
            raise StoreError(f"{self._name} holds no passages")
        self._segment = HnswSegment(self._folder / vectors, dimension)
        written = last_change(self._folder, vectors) or self._segment.last_change
        if written is None:
            raise StoreError(f"{self._name} does not record how far its vectors were written: it is not supported")
        last = self._read_log(own_id, written)
        if count != len(self._segment.ids) + len(self._only_logged):
            raise StoreError(
                f"{self._name} has {count:,} passages, but other vectors: open it once with Chroma and call its count()"
            )
        metric = metric_of(self._space(collection, vectors), self._name)
        fingerprint = f"hnsw-{own_id}-{count}-{last}-{metric}"  # the order of the rows is another than in "chroma-…"
        return SourceFacts(self._name, fingerprint, count, dimension, metric)

    def _read_log(self, collection: str, written: int) -> int:
        """Finds the vectors that are in the log only; returns the number of the last change."""
        query = "SELECT seq_id, operation, id FROM embeddings_queue WHERE topic LIKE ? AND seq_id > ? ORDER BY seq_id"
        log = self._all(query, f"%/{collection}", written)
        if any(row["operation"] not in (_ADD, _UPSERT) for row in log):
            raise StoreError(f"{self._name} has updates or deletions that are not in its vector files: not supported")
        ids = self._segment.ids
        in_file = set(ids.filter(ids.is_in([str(row["id"]) for row in log])))
        self._logged: dict[str, int] = {}
        for row in log:  # as in Chroma: adding an existing id does nothing
            if row["operation"] == _UPSERT or (row["id"] not in self._logged and row["id"] not in in_file):
                self._logged[row["id"]] = row["seq_id"]
        self._only_logged = [own_id for own_id in self._logged if own_id not in in_file]
        return log[-1]["seq_id"] if log else written

    def _space(self, collection: Mapping[str, Any], segment: str) -> str:
        # From the segment, to which Chroma copied it: users may have replaced the collection's metadata since.
        query = "SELECT str_value FROM segment_metadata WHERE segment_id = ? AND key = 'hnsw:space'"
        metadata = {"hnsw:space": next((row[0] for row in self._all(query, segment)), None)}
        schema, settings = (json.loads(collection.get(name) or "{}") for name in ("schema_str", "config_json_str"))
        return space_of(schema, metadata, settings)

    def _rows(self, start: int) -> Iterator[Block]:
        with self._store_errors():
            for ids, vectors in self._segment.blocks(start):
                for row, own_id in enumerate(ids):
                    if own_id in self._logged:
                        vectors[row] = self._logged_vector(own_id)
                yield self._passages_of(ids), vectors
            if ids := self._only_logged[max(0, start - len(self._segment.ids)) :]:
                yield self._passages_of(ids), np.stack([self._logged_vector(own_id) for own_id in ids])

    def _logged_vector(self, own_id: str) -> Vectors:
        query = "SELECT vector FROM embeddings_queue WHERE seq_id = ? AND encoding = 'FLOAT32'"
        ((content,),) = self._all(query, self._logged[own_id])
        return np.frombuffer(content, "<f4")

    def _passages_of(self, ids: Sequence[str]) -> list[Passage]:
        rows = {str(row["id"]): row for row in self._all(_PASSAGES, self._passages, json.dumps(ids))}
        if missing := next((own_id for own_id in ids if own_id not in rows), None):
            raise StoreError(f"{self._name} has no passage for the vector {missing!r}")
        found = [rows[own_id] for own_id in ids]
        titles = [{"title": row["title"]} if row["is_titled"] else {} for row in found]
        answer = {"ids": [ids], "documents": [[row["document"] for row in found]], "metadatas": [titles]}
        return list(read_answer(answer, "l2")[0])

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        return self._database.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, IndexError) as error:
            raise StoreError(
                f"{self._folder} cannot be read ({error}): it is damaged, being written, or not of chromadb 0.5 to 1.5"
            ) from error


class HnswSegment:
    """The vectors of a collection in its files. Blocking.

    Raises OSError, or ValueError for an unsupported layout, another dimension, or truncated files.
    """

    def __init__(self, folder: Path, dimension: int) -> None:
        path = folder / ROWS_NAME
        header = (folder / HEADER_NAME).read_bytes()[: _HEADER.size]
        version, _, _, rows, size, label, vector = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
        if version != 1 or label != vector + 4 * dimension or size != label + 8:
            raise ValueError(f"{folder / HEADER_NAME} has an unsupported layout, or is not of dimension {dimension}")
        if path.stat().st_size < rows * size:
            raise ValueError(f"{path} is truncated: it has not the {rows:,} rows of its header")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        layout = [("links", f"V{vector}"), ("vector", "<f4", (dimension,)), ("label", "<u8")]
        self._rows = np.frombuffer(self._map, np.dtype(layout), rows)
        self.ids, self._labels, self.last_change = read_labels(folder / LABELS_NAME)
        """``ids`` ascend by label; see :func:`read_labels`."""

    def blocks(self, start: int) -> Iterator[tuple[list[str], Vectors]]:
        """Ids and vectors from the row ``start`` on, not counting rows that were deleted."""
        is_dense = len(self._labels) == len(self._rows)
        left = 0 if is_dense else start
        for first in range(start if is_dense else 0, len(self._rows), ROWS):
            part = self._rows[first : first + ROWS]
            labels = part["label"].astype(np.int64)
            places = np.minimum(np.searchsorted(self._labels, labels), len(self._labels) - 1)
            present = np.flatnonzero(self._labels[places] == labels)
            skipped, left = min(left, len(present)), max(0, left - len(present))
            if len(present := present[skipped:]):
                yield self.ids[places[present]].to_list(), part["vector"][present].astype(np.float32)
            if hasattr(mmap, "MADV_DONTNEED"):  # pages read would count as this process's memory
                self._map.madvise(mmap.MADV_DONTNEED)
            anyio.from_thread.check_cancelled()


def read_labels(path: Path) -> tuple[pl.Series, NDArray[np.int64], int | None]:
    """Ids and their labels in HNSW rows, ascending by label, from an ``index_metadata.pickle``, which is never unpickled. Blocking.

    The third value is the last change in the files; None for newer versions, which record it in the database. Raises OSError, or
    ValueError if it was not written by Chroma.
    """
    text, is_within, last_change, ids = None, False, None, list[str]()
    parts, labels = [pl.Series(dtype=pl.String)], array("q")
    with path.open("rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            if "UNICODE" in opcode.name:
                text = str(argument)
            elif opcode.name in ("BININT", "BININT1", "BININT2", "LONG1"):
                if is_within:
                    if text is None:
                        break
                    ids.append(text)
                    labels.append(int(argument or 0))
                    if len(ids) == 1 << 20:  # as Python objects
                        parts.append(pl.Series(ids))
                        ids.clear()
                        anyio.from_thread.check_cancelled()
                elif text == "max_seq_id":
                    last_change = argument
                text = None
            elif opcode.name == "EMPTY_DICT":
                if is_within:
                    numbers = np.frombuffer(labels, np.int64)
                    order = np.argsort(numbers)
                    return pl.concat([*parts, pl.Series(ids, dtype=pl.String)])[order], numbers[order], last_change
                is_within = text == "id_to_label"
    raise ValueError(f"{path} was not written by Chroma")
