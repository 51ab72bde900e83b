"""Reads the database of a Chroma folder, ``chroma.sqlite3``: collections, and which changes their vector files contain.

Uses SQLite only, not Chroma. Supports folders of chromadb 0.5 to 1.5. All functions block and let ``sqlite3.Error`` propagate to
callers, who word it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from searchr1_async.errors import StoreError
from searchr1_async.search.stores.chroma import space_of

DATABASE_NAME = "chroma.sqlite3"
_VECTOR_SEGMENT = "urn:chroma:segment/vector/hnsw-local-persisted"
_METADATA_SEGMENT = "urn:chroma:segment/metadata/sqlite"
_ADD, _UPDATE, _UPSERT, _DELETE = range(4)
"""Operations of the write-ahead log."""


class ChromaTables:
    """One collection, as its folder's database describes it.

    Args:
        folder: folder of the database.
        collection: collection name; None if there is only one.
        is_read_only: False lets SQLite roll back a killed writer's transaction, as Chroma does on opening.

    Raises:
        StoreError: the collection is missing or ambiguous, or its layout is not supported.
        sqlite3.Error: the database cannot be read.
    """

    def __init__(self, folder: Path, collection: str | None, *, is_read_only: bool = True) -> None:
        path = folder / DATABASE_NAME
        mode = "ro" if is_read_only else "rw"
        self.folder = folder
        self._database = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, check_same_thread=False)
        self._database.row_factory = sqlite3.Row
        try:
            self._read(collection)
        except BaseException:
            self._database.close()
            raise

    def _read(self, name: str | None) -> None:
        self._collection = self._find(name)
        self.name = f"Chroma collection {self._collection['name']!r} in {self.folder}"
        self.id = str(self._collection["id"])
        found = self.all("SELECT id, type FROM segments WHERE collection = ?", self.id)
        segments = {row["type"]: str(row["id"]) for row in found}
        if set(segments) != {_VECTOR_SEGMENT, _METADATA_SEGMENT}:
            raise StoreError(f"{self.name} has an unsupported layout (segments {', '.join(segments) or 'none'})")
        self.metadata_segment = segments[_METADATA_SEGMENT]
        self.vector_segment = segments[_VECTOR_SEGMENT]
        ((self.count,),) = self.all("SELECT count(*) FROM embeddings WHERE segment_id = ?", self.metadata_segment)
        self.dimension = int(self._collection["dimension"] or 0)
        self._topic = f"%/{self.id}"
        self._changes = {str(row[0]): _number(row[1]) for row in self.all("SELECT segment_id, seq_id FROM max_seq_id")}

    def _find(self, name: str | None) -> sqlite3.Row:
        rows = self.all("SELECT * FROM collections ORDER BY name")
        found = [row for row in rows if name in (None, row["name"])]
        if len(found) == 1:
            return found[0]
        there = ", ".join(sorted({str(row["name"]) for row in rows})) or "none"
        wanted = "has several collections" if name is None else f"has {len(found) or 'no'} collections named {name!r}"
        raise StoreError(f"{self.folder} {wanted} (available: {there}): name one that exists once")

    @property
    def space(self) -> str:
        """The collection's distance metric."""
        # Read from the segment, to which Chroma copied it: users may have replaced the collection's metadata since.
        query = "SELECT str_value FROM segment_metadata WHERE segment_id = ? AND key = 'hnsw:space'"
        metadata = {"hnsw:space": next((row[0] for row in self.all(query, self.vector_segment)), None)}
        columns = self._collection.keys()
        schema = _json(self._collection["schema_str"]) if "schema_str" in columns else {}
        configuration = _json(self._collection["config_json_str"]) if "config_json_str" in columns else {}
        return space_of(schema, metadata, configuration)

    @property
    def segment_folder(self) -> Path:
        """Folder of the HNSW files; before 1,000 changes (by default), all vectors are in the log only."""
        return self.folder / self.vector_segment

    @property
    def passages_changed(self) -> int:
        """Number of the last change in the passages."""
        return self._changes.get(self.metadata_segment, 0)

    @property
    def vectors_changed(self) -> int | None:
        """Number of the last change in the HNSW files; None if the database does not record it."""
        return self._changes.get(self.vector_segment)

    @property
    def logged(self) -> int:
        """Number of the last change in the log; 0 if empty."""
        ((logged,),) = self.all("SELECT max(seq_id) FROM embeddings_queue WHERE topic LIKE ?", self._topic)
        return logged or 0

    def replayed(self, after: int, is_in_segment: Callable[[str], bool]) -> dict[str, int | None]:
        """For each id changed since the HNSW files, the log entry with its vector; None if deleted."""
        where: dict[str, int | None] = {}
        query = (
            "SELECT seq_id, operation, id, vector IS NOT NULL FROM embeddings_queue "
            "WHERE seq_id > ? AND topic LIKE ? ORDER BY seq_id"
        )
        for change, operation, own_id, has_vector in self._database.execute(query, (after, self._topic)):
            if operation == _DELETE:
                where[own_id] = None
                continue
            is_there = where[own_id] is not None if own_id in where else is_in_segment(own_id)
            # As in Chroma: adding an existing id or updating a missing one does nothing.
            if has_vector and (operation == _UPSERT or is_there == (operation == _UPDATE)):
                where[own_id] = int(change)
        return where

    def all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        return self._database.execute(query, values).fetchall()

    def close(self) -> None:
        self._database.close()


def _number(change: int | bytes) -> int:
    """The number of a change; older versions store it as bytes."""
    return int.from_bytes(change, "big") if isinstance(change, bytes) else int(change)


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}
