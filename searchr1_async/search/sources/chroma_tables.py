"""The database of a Chroma folder, ``chroma.sqlite3``: its collections, and which changes their vector files hold.

Read by SQLite alone, without Chroma. Written for the folders of chromadb 0.5 to 1.5. All functions block on the disk, and raise
``sqlite3.Error`` as it comes: their callers know what to say of it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from searchr1_async.errors import StoreError
from searchr1_async.search.stores.chroma.layout import space_of

DATABASE_NAME = "chroma.sqlite3"
_VECTOR_SEGMENT = "urn:chroma:segment/vector/hnsw-local-persisted"
_METADATA_SEGMENT = "urn:chroma:segment/metadata/sqlite"
_ADD, _UPDATE, _UPSERT, _DELETE = range(4)
"""Operations of the write-ahead log."""


class ChromaTables:
    """One collection as the database of its folder describes it.

    Args:
        folder: of the database.
        collection: its name; None is the only one there.
        is_read_only: False lets SQLite undo what a killed writer left half-done, as Chroma does when it opens the folder.

    Raises:
        StoreError: no such collection, several, or a layout that is not known here.
        sqlite3.Error: it cannot be read.
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
            raise StoreError(
                f"{self.name} has a layout that is not known here (segments {', '.join(segments) or 'none'})"
            )
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
        wanted = "holds several collections" if name is None else f"holds {len(found) or 'no'} collections {name!r}"
        raise StoreError(f"{self.folder} {wanted} (there are: {there}): name one that is there once")

    @property
    def space(self) -> str:
        """The distance that the collection measures."""
        # Of the segment, to which Chroma copied it: users may have replaced the collection's own metadata since.
        query = "SELECT str_value FROM segment_metadata WHERE segment_id = ? AND key = 'hnsw:space'"
        metadata = {"hnsw:space": next((row[0] for row in self.all(query, self.vector_segment)), None)}
        columns = self._collection.keys()
        schema = _json(self._collection["schema_str"]) if "schema_str" in columns else {}
        configuration = _json(self._collection["config_json_str"]) if "config_json_str" in columns else {}
        return space_of(schema, metadata, configuration)

    @property
    def segment_folder(self) -> Path:
        """Where the HNSW files are; before the first 1,000 changes, by default, all vectors are in the log only."""
        return self.folder / self.vector_segment

    @property
    def passages_changed(self) -> int:
        """The number of the last change that is in the passages."""
        return self._changes.get(self.metadata_segment, 0)

    @property
    def vectors_changed(self) -> int | None:
        """The number of the last change that is in the HNSW files; None where the database does not say."""
        return self._changes.get(self.vector_segment)

    @property
    def logged(self) -> int:
        """The number of the last change in the log; 0 where it is empty."""
        ((logged,),) = self.all("SELECT max(seq_id) FROM embeddings_queue WHERE topic LIKE ?", self._topic)
        return logged or 0

    def replayed(self, after: int, is_in_segment: Callable[[str], bool]) -> dict[str, int | None]:
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
            is_there = where[own_id] is not None if own_id in where else is_in_segment(own_id)
            # As Chroma does it: what is added again stays as it was, and what is not there is not updated.
            if has_vector and (operation == _UPSERT or is_there == (operation == _UPDATE)):
                where[own_id] = int(change)
        return where

    def all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """The rows of a query."""
        return self._database.execute(query, values).fetchall()

    def close(self) -> None:
        """Lets go of the file."""
        self._database.close()


def _number(change: int | bytes) -> int:
    """Of a change; older versions keep it as bytes."""
    return int.from_bytes(change, "big") if isinstance(change, bytes) else int(change)


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}
