"""A Chroma collection in a folder, opened in this process."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import anyio

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.waits import OwnThread, in_thread
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.stores.base import Metric
from searchr1_async.search.stores.chroma.faults import fault_of_embedded
from searchr1_async.search.stores.chroma.layout import INCLUDE, NEW_COLLECTION, CollectionModel
from searchr1_async.search.stores.chroma.store import ChromaStore
from searchr1_async.search.stores.proof import refuse_unproven

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""Timeout for the last call: Chroma waits many minutes, silently, while another process locks the database."""
PAGE = 5_000
"""Rows per call; Chroma's limit is 5,461 with its default SQLite."""


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
        from searchr1_async.search.stores.chroma.proof import advice_for, look_at  # avoids an import cycle

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
        from searchr1_async.search.stores.chroma.proof import record_files

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
