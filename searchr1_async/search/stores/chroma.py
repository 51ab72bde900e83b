"""Chroma as the vector store: a folder on this machine, or a server started with ``chroma run``."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Found
from searchr1_async.search.threads import OwnThread

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.AsyncCollection import AsyncCollection
    from chromadb.api.models.Collection import Collection

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_ADDED = 5_000
"""Passages that one call puts in; Chroma itself takes 5,461 with its default SQLite."""
_INCLUDE: Any = ["documents", "metadatas", "distances"]
# Chroma's defaults (16 neighbours, 100 candidates) lose passages whose vectors lie about equally far from all others: of 50
# such, some were not found by their own words in half of the builds; with these, all are.
_NEW_COLLECTION: Any = {"hnsw": {"space": "cosine", "max_neighbors": 32, "ef_construction": 200, "ef_search": 200}}


class EmbeddedChroma:
    """A Chroma database in a folder, within this process. Its calls run one after another in a thread of its own.

    Args:
        path: the folder; made when it is first opened.
        collection: its name, 3 to 512 characters of ``a-zA-Z0-9._-``; made with cosine distance when missing.

    Raises:
        StoreError: a name that Chroma does not take.
    """

    max_queries = 1_000

    def __init__(self, path: str | Path, collection: str = "passages") -> None:
        check_collection_name(collection)
        self._path = Path(path).expanduser().absolute()
        self._collection_name = collection
        self._thread = OwnThread("searchr1-chroma")
        self._client: ClientAPI | None = None
        self._collection: Collection | None = None

    @property
    def name(self) -> str:
        return f"Chroma collection {self._collection_name!r} in {self._path}"

    async def open(self) -> None:
        if self._client is None:
            await self._thread.run(self._open)

    def _open(self) -> None:
        import chromadb
        from chromadb.config import Settings

        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._client = chromadb.PersistentClient(self._path, settings=Settings(anonymized_telemetry=False))
        except Exception as error:
            raise StoreError(
                f"the Chroma folder {self._path} cannot be opened ({type(error).__name__}: {error}): "
                "check that it may be written; if it is broken, delete it and it is built again"
            ) from error

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        answer, space = await self._call(
            lambda collection: (
                collection.query(query_embeddings=_as_chroma(vectors), n_results=n_results, include=_INCLUDE),
                _space(collection),
            )
        )
        return read_answer(answer, space)

    async def add(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        for start in range(0, len(passages), MAX_ADDED):
            part = slice(start, start + MAX_ADDED)
            columns = _columns(passages[part], vectors[part])
            await self._call(lambda collection, columns=columns: collection.upsert(**columns))

    async def count(self) -> int:
        return await self._call(lambda collection: collection.count())

    async def aclose(self) -> None:
        client, self._client, self._collection = self._client, None, None
        if client is not None:
            try:
                # ClientAPI does not declare it; every client has it.
                await self._thread.run(client.close)  # pyright: ignore[reportAttributeAccessIssue]
            finally:
                self._thread.close()

    async def _call(self, function: Callable[[Collection], Result]) -> Result:
        return await self._thread.run(self._with_collection, function)

    def _with_collection(self, function: Callable[[Collection], Result]) -> Result:
        """In the thread: the collection is looked up once, and again if it was deleted and made anew since."""
        from chromadb.errors import ChromaError, NotFoundError

        if self._client is None:
            raise StoreError(f"{self.name} is not open")
        try:
            if self._collection is not None:
                try:
                    return function(self._collection)
                except NotFoundError:
                    logger.info("%s was made anew: it is looked up again", self.name)
            self._collection = self._client.get_or_create_collection(
                self._collection_name, embedding_function=None, configuration=_NEW_COLLECTION
            )
            return function(self._collection)
        except StoreError:
            raise
        except ChromaError as error:
            raise failed(self.name, error) from error
        except Exception as error:  # the Rust bindings raise plain exceptions
            raise failed(self.name, error) from error


class RemoteChroma:
    """A collection of a Chroma server, over HTTP.

    Args:
        host: name or address, or a whole URL.
        port: TCP port.
        collection: its name; it must exist, unless ``create``.
        ssl: HTTPS.
        headers: sent with every request (a token, say); never logged.
        create: make the collection, with cosine distance, when it is missing.

    Raises:
        StoreError: a name that Chroma does not take.
    """

    max_queries = 100

    def __init__(
        self,
        host: str = "localhost",
        port: int = 8000,
        collection: str = "wiki_embeddings",
        *,
        ssl: bool = False,
        headers: Mapping[str, str] | None = None,
        create: bool = False,
    ) -> None:
        check_collection_name(collection)
        self._host, self._port, self._ssl = host, port, ssl
        self._headers = dict(headers or {})
        self._collection_name = collection
        self._create = create
        self._server: Any = None
        self._collection: AsyncCollection | None = None

    @property
    def name(self) -> str:
        address = self._host if "://" in self._host else f"{self._host}:{self._port}"
        return f"Chroma collection {self._collection_name!r} at {address}"

    async def open(self) -> None:
        if self._server is not None:
            return
        self._server = _server(self._host, self._port, self._ssl, self._headers)
        try:
            await self._server.__aenter__()
            await self._call(lambda collection: collection.count())
        except BaseException:
            await self.aclose()
            raise

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        async def ask(collection: AsyncCollection) -> tuple[Any, str]:
            answer = await collection.query(query_embeddings=_as_chroma(vectors), n_results=n_results, include=_INCLUDE)
            return answer, _space(collection)

        answer, space = await self._call(ask)
        return read_answer(answer, space)

    async def add(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        for start in range(0, len(passages), MAX_ADDED):
            part = slice(start, start + MAX_ADDED)
            columns = _columns(passages[part], vectors[part])
            await self._call(lambda collection, columns=columns: collection.upsert(**columns))

    async def count(self) -> int:
        return await self._call(lambda collection: collection.count())

    async def aclose(self) -> None:
        server, self._server, self._collection = self._server, None, None
        if server is not None:
            await server.__aexit__(None, None, None)

    async def _call(self, function: Callable[[AsyncCollection], Awaitable[Result]]) -> Result:
        from chromadb.errors import NotFoundError

        if self._server is None:
            raise StoreError(f"{self.name} is not open")
        try:
            if self._collection is not None:
                try:
                    return await function(self._collection)
                except NotFoundError:
                    logger.info("%s was made anew: it is looked up again", self.name)
            self._collection = await self._look_up()
            return await function(self._collection)
        except NotFoundError as error:
            raise StoreError(
                f"{self.name} does not exist: check the name, or serve the folder that holds it "
                "(`chroma run --path <folder>`)"
            ) from error
        except StoreError:
            raise
        except Exception as error:
            raise failed(self.name, error) from error

    async def _look_up(self) -> AsyncCollection:
        from chromadb.api.models.AsyncCollection import AsyncCollection

        if self._create:
            model = await self._server.get_or_create_collection(
                name=self._collection_name, configuration=_NEW_COLLECTION
            )
        else:
            model = await self._server.get_collection(name=self._collection_name)
        return AsyncCollection(client=self._server, model=model, embedding_function=None)


def _server(host: str, port: int, ssl: bool, headers: dict[str, str]) -> Any:
    """Chroma's asynchronous HTTP interface, with connections of its own.

    ``chromadb.AsyncHttpClient`` keeps one connection pool for each event loop in a variable of the class: a second
    client in the same loop would send the first one's headers, closing any client closes all, and a later loop that
    happens to have the same hash would get the pool of a dead one. (chromadb 1.5.9)
    """
    from chromadb.api.async_fastapi import AsyncFastAPI
    from chromadb.config import Settings, System

    class OwnConnections(AsyncFastAPI):
        def __init__(self, system: System) -> None:
            super().__init__(system)
            self._clients = {}

    return OwnConnections(
        System(
            Settings(
                anonymized_telemetry=False,
                chroma_api_impl="chromadb.api.async_fastapi.AsyncFastAPI",
                chroma_server_host=host,
                chroma_server_http_port=port,
                chroma_server_ssl_enabled=ssl,
                chroma_server_headers=headers,
            )
        )
    )


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


def failed(name: str, error: Exception) -> StoreError:
    """What to say of an exception of Chroma or its transport."""
    import httpx

    text = str(error).strip() or type(error).__name__
    if isinstance(error, httpx.TransportError):
        return StoreError(f"{name} does not answer ({type(error).__name__}): check that `chroma run` is up, and where")
    if "dimension" in text.lower():
        return StoreError(f"{name} was built with another embedder ({text}): search it with the one it was built with")
    return StoreError(f"{name} failed ({type(error).__name__}: {text[:300]})")


def read_answer(answer: Mapping[str, Any], space: str) -> Found:
    """Chroma's columns as passages: id, document, the title in the metadata if there is one, and the similarity."""
    ids = answer["ids"]
    documents = answer.get("documents") or [[None] * len(row) for row in ids]
    metadatas = answer.get("metadatas") or [[None] * len(row) for row in ids]
    distances = answer.get("distances") or [[0.0] * len(row) for row in ids]
    return tuple(
        tuple(
            Passage(str(own_id), str((metadata or {}).get("title") or ""), document or "", _similarity(distance, space))
            for own_id, document, metadata, distance in zip(*row, strict=True)
        )
        for row in zip(ids, documents, metadatas, distances, strict=True)
    )


def _similarity(distance: float | None, space: str) -> float:
    """Cosine similarity of unit vectors, from Chroma's distance: squared for ``l2``, one minus the product otherwise."""
    if distance is None:
        return 0.0
    return 1.0 - float(distance) / 2 if space == "l2" else 1.0 - float(distance)


def _space(collection: Any) -> str:
    configuration = collection.configuration_json  # `configuration` would warn of a missing embedding function
    for kind in ("hnsw", "spann"):
        if isinstance(part := configuration.get(kind), Mapping) and part.get("space"):
            return str(part["space"])
    return "l2"


def _columns(passages: Sequence[Passage], vectors: Vectors) -> dict[str, Any]:
    return {
        "ids": [passage.id for passage in passages],
        "documents": [passage.text for passage in passages],
        "metadatas": [{"title": passage.title} for passage in passages],
        "embeddings": _as_chroma(vectors),
    }


def _as_chroma(vectors: Vectors) -> Any:
    return np.ascontiguousarray(vectors, dtype=np.float32)
