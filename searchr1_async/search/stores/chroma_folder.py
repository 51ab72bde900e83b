"""A Chroma collection in a folder, opened in this process.

Chroma trusts its files: damaged ones give wrong answers, or crash the process. So a finished index has a record of their checksums,
which is compared before Chroma loads them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.from_thread
import msgspec

from searchr1_async.boundary.paths import absolute_path, write_atomically
from searchr1_async.boundary.waits import OwnThread, in_thread
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import PassingFault, fault_of_embedded
from searchr1_async.search.stores.chroma import INCLUDE, NEW_COLLECTION, ChromaStore, CollectionModel
from searchr1_async.search.stores.compat import DATABASE_NAME, ROWS_NAME, VECTOR_FILES, last_change
from searchr1_async.search.stores.vector_store import (
    DamagedIndexError,
    FileRecord,
    building_call,
    record_of,
    refuse_other,
)

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection


Result = TypeVar("Result")
RECORD_NAME = "files.json"
"""File in the index folder: a :class:`_Record`."""
CLOSE_SECONDS = 10.0
"""Timeout for the last call: Chroma waits many minutes, silently, while another process locks the database."""
PAGE = 5_000
"""Rows per call; Chroma's limit is 5,461 with its default SQLite."""


@dataclass(frozen=True, slots=True)
class _Record:
    """The vector files of a complete index, and the number of the last change in them."""

    segment: str
    changes: int
    files: dict[str, FileRecord]


def refuse_changed_files(folder: Path) -> None:
    """Compares the vector files with their record, if there is one and Chroma has not rewritten them since. Blocking.

    Raises DamagedIndexError, or PassingFault if another process is writing to the folder.
    """
    database, advice = folder / DATABASE_NAME, advice_for(folder)
    if not database.is_file() and any(folder.glob(f"*/{ROWS_NAME}")):
        raise DamagedIndexError(f"{database} is missing", advice)
    try:
        record = msgspec.json.decode((folder / RECORD_NAME).read_bytes(), type=_Record)
        changes = last_change(folder, record.segment)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return  # there is none, or it is corrupt itself
    except sqlite3.Error as error:
        if "locked" in str(error) or "busy" in str(error):
            raise PassingFault(f"{database} is locked by another process ({error})", cause="locked") from error
        raise DamagedIndexError(f"{database} is damaged ({error})", advice) from error
    if changes == record.changes:
        for name, file in record.files.items():
            refuse_other(folder / record.segment / name, file, advice)


def record_files(folder: Path) -> None:
    """Records sizes and checksums of the vector files of a complete index, alone in its folder. Raises OSError or sqlite3.Error."""
    segments = [path.parent for path in folder.glob(f"*/{ROWS_NAME}")]
    if len(segments) != 1 or (changes := last_change(folder, segments[0].name)) is None:
        return  # all vectors are in the log
    paths = [path for name in VECTOR_FILES if (path := segments[0] / name).is_file()]
    files = {path.name: record_of(path, anyio.from_thread.check_cancelled) for path in paths}
    write_atomically(folder / RECORD_NAME, msgspec.json.encode(_Record(segments[0].name, changes, files)))


def advice_for(folder: Path) -> str:
    """How to restore a damaged index."""
    if (call := building_call(folder)) is not None:
        return f"To rebuild it: {call}"
    return "Restore the folder from a copy, or delete it and rebuild the index"


class EmbeddedChroma(ChromaStore):
    """A Chroma database in a folder, opened in this process. Calls run one at a time in a dedicated thread.

    While another process writes to the folder, Chroma blocks silently: queries until the caller's deadline, opening and counting
    with the GIL held (chromadb 1.5.9). Let only one process write at a time.

    Args:
        path: the folder; created on first open.
        collection: collection name, 3 to 512 characters of ``a-zA-Z0-9._-``; created with cosine distance if missing.

    Raises:
        StoreError: Chroma does not accept the name.
    """

    max_queries = 1_000
    max_requests = 1

    def __init__(self, path: str | Path, collection: str = "passages") -> None:
        self._folder = absolute_path(path, "path")
        super().__init__(f"Chroma collection {collection!r} in {self._folder}", collection, PAGE)
        self._thread = OwnThread("searchr1-chroma")
        self._client: ClientAPI | None = None
        self._collection: Collection | None = None

    async def open(self) -> None:
        """Checks the files and opens the folder. Raises as any store, or DamagedIndexError."""
        if self._model is None:
            await in_thread(lambda: refuse_changed_files(self._folder))
        await super().open()

    async def record(self) -> None:
        """Records sizes and checksums of the files in the folder, to be checked at the next open. Raises StoreError."""
        try:
            await in_thread(lambda: record_files(self._folder))
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the files of {self.name} cannot be recorded ({error})") from error

    def _is_connected(self) -> bool:
        return self._client is not None

    async def _connect(self) -> CollectionModel:
        await self._thread.run(self._open_client)
        return await self._run(self._look_up)

    def _open_client(self) -> None:
        import chromadb
        from chromadb.config import Settings

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._client = chromadb.PersistentClient(self._folder, settings=Settings(anonymized_telemetry=False))
        except Exception as error:
            if isinstance(fault := fault_of_embedded(self.name, error), PassingFault):
                raise fault from error
            raise StoreError(
                f"the Chroma folder {self._folder} cannot be opened ({type(error).__name__}: {error}): "
                "check that it is writable; if it is corrupt, delete it to have it rebuilt",
                is_fatal=True,
            ) from error

    def _look_up(self) -> CollectionModel:
        if self._client is None:
            raise StoreError(f"{self.name} is not open")
        settings: Any = NEW_COLLECTION
        found = self._collection = self._client.get_or_create_collection(
            self._collection_name, embedding_function=None, configuration=settings
        )
        vectors = found.get(limit=1, include=["embeddings"])["embeddings"]
        dimension = None if vectors is None or not len(vectors) else len(vectors[0])
        return CollectionModel.of(found.id, dimension, found.configuration_json, found.metadata)

    async def _query(self, collection: str, vectors: Vectors, n_results: int) -> Mapping[str, Any]:
        asked: Any = {"query_embeddings": vectors, "n_results": n_results, "include": list(INCLUDE)}
        return await self._use(lambda found: found.query(**asked))

    async def _upsert(self, collection: str, columns: Mapping[str, Any]) -> None:
        await self._use(lambda found: found.upsert(**columns))

    async def _existing(self, collection: str, ids: Sequence[str]) -> Sequence[str]:
        return await self._use(lambda found: found.get(ids=list(ids), include=[])["ids"])

    async def _count(self, collection: str) -> int:
        return await self._use(lambda found: found.count())

    async def _use(self, request: Callable[[Collection], Result]) -> Result:
        def asked() -> Result:
            if self._collection is None:
                raise StoreError(f"{self.name} is not open")
            return request(self._collection)

        return await self._run(asked)

    async def _disconnect(self) -> None:
        client, self._client, self._collection = self._client, None, None
        if client is None:
            return
        try:
            with anyio.move_on_after(CLOSE_SECONDS):  # then closing continues in the background
                # Not declared by ClientAPI, but every client has it.
                await self._thread.run(client.close)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._thread.close()

    async def _run(self, function: Callable[[], Result]) -> Result:
        try:
            return await self._thread.run(function)
        except Exception as error:  # the Rust bindings raise plain exceptions
            raise fault_of_embedded(self.name, error) from error
