"""A Chroma collection in a folder, opened in this process.

The files are checked first: Chroma trusts them, and corrupt ones may crash the process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import anyio
import anyio.from_thread
import numpy as np

from searchr1_async.boundary.paths import absolute_path, write_atomically
from searchr1_async.boundary.waits import OwnThread, in_thread
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import PassingFault, fault_of_embedded
from searchr1_async.search.stores.chroma import INCLUDE, NEW_COLLECTION, ChromaStore, CollectionModel
from searchr1_async.search.stores.chroma_files import (
    FILE_NAMES,
    LABELS_NAME,
    ROWS_NAME,
    SPOTS,
    WHOLE_BYTES,
    BrokenSegmentError,
    HnswSegment,
    check_segment,
)
from searchr1_async.search.stores.chroma_tables import DATABASE_NAME, ChromaTables
from searchr1_async.search.stores.vector_store import (
    SAMPLE,
    DamagedIndexError,
    FileRecord,
    Metric,
    building_call,
    record_of,
    refuse_other,
    refuse_unproven,
)

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

RECORD_NAME = "files.json"
"""File in the index folder with sizes and checksums of the vector files, and the last change they contain."""

Result = TypeVar("Result")
logger = logging.getLogger(__name__)
CLOSE_SECONDS = 10.0
"""Timeout for the last call: Chroma waits many minutes, silently, while another process locks the database."""
PAGE = 5_000
"""Rows per call; Chroma's limit is 5,461 with its default SQLite."""


@dataclass(frozen=True, slots=True)
class Looked:
    """The checked files of a collection."""

    space: str
    sample: Vectors
    """Vectors that a search must find, ``[n, dimension]``; empty if all vectors are in the log."""


def look_at(folder: Path, collection: str) -> Looked | None:
    """Checks the files of a collection; None if it does not exist or is empty. Blocking.

    Raises:
        DamagedIndexError: a file is missing, truncated or not Chroma's, or passages have lost their vectors.
        PassingFault: another process is writing to the folder.
    """
    if not (folder / DATABASE_NAME).is_file():
        if any(folder.glob(f"*/{ROWS_NAME}")):
            raise DamagedIndexError(f"{folder / DATABASE_NAME} is missing", advice_for(folder))
        return None
    with _store_errors(folder):
        try:
            tables = ChromaTables(folder, collection, is_read_only=False)
        except StoreError:
            return None  # no such collection, or a layout only Chroma can read
        try:
            return _looked_at(tables) if tables.count and tables.dimension else None
        finally:
            tables.close()


def record_files(folder: Path, collection: str) -> None:
    """Records sizes and checksums of the vector files of a complete index. Blocking.

    A later change also changes Chroma's database, which invalidates the record.

    Raises:
        OSError: the files cannot be read, or the record cannot be written.
        sqlite3.Error, StoreError: not such a folder.
    """
    tables = ChromaTables(folder, collection)
    try:
        segment, changes = tables.segment_folder, tables.vectors_changed
    finally:
        tables.close()
    names = [name for name in FILE_NAMES if (segment / name).is_file()]
    if LABELS_NAME not in names or changes is None:  # all vectors are in the log
        return
    records = {name: asdict(record_of(segment / name, anyio.from_thread.check_cancelled)) for name in names}
    content = {"segment": segment.name, "changes": changes, "files": records}
    write_atomically(folder / RECORD_NAME, json.dumps(content).encode())


def advice_for(folder: Path) -> str:
    """How to restore a damaged index."""
    if (call := building_call(folder)) is not None:
        return f"To rebuild it: {call}"
    return "Restore the folder from a copy, or delete it and rebuild the index"


def _looked_at(tables: ChromaTables) -> Looked:
    folder, segment_folder = tables.folder, tables.segment_folder
    before = _state(segment_folder)
    try:
        are_known = _are_recorded(folder, tables)
        segment = None
        if (segment_folder / LABELS_NAME).exists() or tables.vectors_changed:
            is_cosine = tables.space == "cosine"
            segment = check_segment(segment_folder, tables.dimension, is_cosine=is_cosine, are_known=are_known)
        return Looked(tables.space, _proven_vectors(tables, segment))
    except (BrokenSegmentError, DamagedIndexError) as error:
        if _state(segment_folder) != before:
            raise PassingFault(f"{tables.name} is being written by another process", cause="locked") from error
        fault = error.fault if isinstance(error, DamagedIndexError) else str(error)
        raise DamagedIndexError(f"{tables.name} is damaged: {fault}", advice_for(folder)) from error


def _are_recorded(folder: Path, tables: ChromaTables) -> bool:
    """Whether the vector files match the record. False if there is none, or Chroma has rewritten the files since.

    Raises:
        DamagedIndexError: they should match, but do not.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_bytes())
        if (record["segment"], record["changes"]) != (tables.vector_segment, tables.vectors_changed):
            return False
        files = {str(name): FileRecord(**values) for name, values in record["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False  # missing, or corrupt itself
    for name, file in files.items():
        refuse_other(tables.segment_folder / name, file, check=anyio.from_thread.check_cancelled)
    return ROWS_NAME in files


def _proven_vectors(tables: ChromaTables, segment: HnswSegment | None) -> Vectors:
    """A sample of the stored vectors. Raises if a passage has no vector in the files or the log."""

    def is_in_segment(own_id: str) -> bool:
        return segment is not None and bool(segment.labels.of([own_id])[0] >= 0)

    changes = -1
    if segment is not None:
        changes = tables.vectors_changed or segment.labels.max_seq_id or -1
    logged = tables.replayed(changes, is_in_segment)
    held = 0 if segment is None else len(segment.labels.labels)
    for own_id, change in logged.items():
        held += (change is not None) - is_in_segment(own_id)
    if held < tables.count:
        raise BrokenSegmentError(f"{tables.count - held:,} of {tables.count:,} passages have lost their vectors")
    if segment is None:
        return np.empty((0, tables.dimension), np.float32)
    unchanged = np.setdiff1d(segment.labels.labels, segment.labels.of(list(logged)))
    is_small = (tables.segment_folder / ROWS_NAME).stat().st_size <= WHOLE_BYTES
    count = min(len(unchanged), SAMPLE if is_small else SPOTS)
    chosen = unchanged[np.linspace(0, len(unchanged) - 1, count).astype(int)] if count else unchanged
    if is_small or not count:
        vectors = segment.vectors(chosen)
    else:
        vectors = np.concatenate(
            [segment.vectors(np.array([label])) for label in chosen]
        )  # one by one: far apart on disk
    return vectors[vectors.any(axis=1)]  # a zero vector is near nothing, not even itself


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """Sizes and times of the files, which change while another process writes."""
    if not folder.is_dir():
        return []
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


@contextlib.contextmanager
def _store_errors(folder: Path) -> Iterator[None]:
    path = folder / DATABASE_NAME
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise PassingFault(f"{path} is locked by another process ({error})", cause="locked") from error
        if any(folder.glob(f"*/{ROWS_NAME}")):
            raise DamagedIndexError(f"{path} is damaged ({error})", advice_for(folder)) from error
    except sqlite3.DatabaseError as error:
        raise DamagedIndexError(f"{path} is damaged ({error})", advice_for(folder)) from error
    except OSError as error:
        raise StoreError(f"{folder} cannot be read ({error.strerror or error})", is_fatal=True) from error


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
        name = f"Chroma collection {collection!r} in {self._folder}"
        super().__init__(name, _FolderDatabase(name, self._folder), collection, PAGE)

    async def open(self) -> None:
        """Checks the files, opens the folder, and searches for some of its own vectors (see :mod:`..proof`).

        Raises:
            DamagedIndexError: a file is missing, truncated or corrupt, or the sampled vectors are not found.
            PassingFault: another process is writing to it.
            StoreError: it cannot be opened.
        """

        if self._model is not None and self._database.is_open:
            return
        looked = await in_thread(lambda: look_at(self._folder, self._collection_name))
        await super().open()
        if looked is None or self._model is None:
            return
        self._model = replace(self._model, space=looked.space)
        try:
            if looked.space in get_args(Metric):
                await refuse_unproven(self, looked.sample, cast(Metric, looked.space), advice_for(self._folder))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise

    async def record(self) -> None:
        """Records sizes and checksums of the files in the folder, to be checked at the next open.

        Raises:
            StoreError: the files cannot be read, or the record cannot be written.
        """

        try:
            await in_thread(lambda: record_files(self._folder, self._collection_name))
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the files of {self.name} cannot be recorded ({error})") from error


class _FolderDatabase:
    """A Chroma database in a folder, used from one thread only."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._folder = folder
        self._thread = OwnThread("searchr1-chroma")
        self._client: ClientAPI | None = None
        self._collections: dict[str, Collection] = {}

    @property
    def is_open(self) -> bool:
        return self._client is not None

    async def open(self) -> None:
        if self._client is None:
            await self._thread.run(self._open)

    def _open(self) -> None:
        import chromadb
        from chromadb.config import Settings

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._client = chromadb.PersistentClient(self._folder, settings=Settings(anonymized_telemetry=False))
        except Exception as error:
            if isinstance(fault := fault_of_embedded(self._name, error), PassingFault):
                raise fault from error
            raise StoreError(
                f"the Chroma folder {self._folder} cannot be opened ({type(error).__name__}: {error}): "
                "check that it is writable; if it is corrupt, delete it to have it rebuilt",
                is_fatal=True,
            ) from error

    async def look_up(self, collection: str) -> CollectionModel:
        return await self._run(self._look_up, collection)

    def _look_up(self, name: str) -> CollectionModel:
        if self._client is None:
            raise StoreError(f"{self._name} is not open")
        settings: Any = NEW_COLLECTION
        found = self._client.get_or_create_collection(name, embedding_function=None, configuration=settings)
        self._collections = {str(found.id): found}
        model = found._model  # the dimension has no public accessor
        return CollectionModel.of(found.id, model.dimension, found.configuration_json, found.metadata)

    async def query(self, collection_id: str, vectors: Vectors, n_results: int) -> Mapping[str, Any]:
        include: Any = list(INCLUDE)
        return await self._run(
            lambda: self._collection(collection_id).query(
                query_embeddings=vectors, n_results=n_results, include=include
            )
        )

    async def upsert(self, collection_id: str, columns: Mapping[str, Any]) -> None:
        await self._run(lambda: self._collection(collection_id).upsert(**columns))

    async def existing(self, collection_id: str, ids: Sequence[str]) -> Sequence[str]:
        return await self._run(lambda: self._collection(collection_id).get(ids=list(ids), include=[])["ids"])

    async def count(self, collection_id: str) -> int:
        return await self._run(lambda: self._collection(collection_id).count())

    def _collection(self, collection_id: str) -> Collection:
        if (found := self._collections.get(collection_id)) is None:
            raise StoreError(f"{self._name} is not open")
        return found

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        try:
            with anyio.move_on_after(CLOSE_SECONDS) as closing:
                # Not declared by ClientAPI, but every client has it.
                await self._thread.run(client.close)  # pyright: ignore[reportAttributeAccessIssue]
            if closing.cancelled_caught:
                logger.warning("%s is locked by another process: closing continues in the background", self._name)
        finally:
            self._collections = {}
            self._thread.close()

    async def _run(self, function: Callable[..., Result], *args: Any) -> Result:
        try:
            return await self._thread.run(function, *args)
        except Exception as error:  # the Rust bindings raise plain exceptions
            raise fault_of_embedded(self._name, error) from error
