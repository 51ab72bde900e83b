"""Client for the part of Chroma's HTTP API v2 that the search uses (documented at ``/docs`` of any server)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal
from urllib.parse import quote

import aiohttp
import orjson

from searchr1_async.boundary.network import proxy_for
from searchr1_async.errors import SearchError, StoreError
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.faults import RefusedInput
from searchr1_async.search.stores.chroma.faults import (
    MissingCollection,
    fault_of_answer,
    fault_of_exception,
    malformed,
)
from searchr1_async.search.stores.chroma.layout import INCLUDE, NEW_COLLECTION, CollectionModel

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 30.0
"""Idle connections are closed after this; servers and gateways close theirs after 60 s or more."""

WHOLE_BYTES = 2**20
"""Longer bodies are streamed; aiohttp warns otherwise."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server's URL, database and credentials."""

    url: str
    """``https://host:port`` with the path before ``/api/v2``, if any."""
    tenant: str | None
    """None: the one the credentials belong to."""
    database: str | None
    """None: the one the credentials belong to."""
    headers: Mapping[str, str] = field(repr=False)


class ServerDatabase:
    """One database of a Chroma server, with its own connection pool.

    Replaces ``chromadb``'s async client, which takes several times the CPU, shares connections and headers between clients of an
    event loop, has no timeout, and drops the status and ``Retry-After`` of errors (chromadb 1.5.9).

    Args:
        name: for messages.
        address: the server.
        create: create a collection, with cosine distance, if missing.
        connections: maximum concurrent connections; further requests wait.
        timeout: seconds per request, including the wait for a connection.
    """

    def __init__(self, name: str, address: Address, *, create: bool, connections: int, timeout: float) -> None:
        self._name = name
        self._address = address
        self._create = create
        self._connections = connections
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._root: str | None = None
        self._proxy: str | None = None

    @property
    def is_open(self) -> bool:
        return self._session is not None and self._loop is asyncio.get_running_loop()

    async def open(self) -> None:
        if self.is_open:
            return
        if self._session is not None:  # from an event loop that has ended, and its connections with it
            self._session.detach()
        self._loop, self._root = asyncio.get_running_loop(), None
        # Looked up once: aiohttp's "trust_env" uses a thread per request.
        self._proxy = proxy_for(self._address.url)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=CONNECT_SECONDS),
            headers={**self._address.headers, "Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def look_up(self, collection: str) -> CollectionModel:
        root = await self._database_root()
        try:
            if self._create:
                made = {"name": collection, "configuration": NEW_COLLECTION, "get_or_create": True}
                answer = await self._request("POST", f"{root}/collections", made)
            else:
                answer = await self._request("GET", f"{root}/collections/{collection}")
        except (MissingCollection, RefusedInput):
            await self._check_database(root)
            raise
        try:
            return CollectionModel.of(
                answer["id"], answer.get("dimension"), answer.get("configuration_json"), answer.get("metadata")
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise malformed(self._name) from error

    async def query(self, collection_id: str, vectors: Vectors, n_results: int) -> Mapping[str, Any]:
        asked = {"query_embeddings": vectors, "n_results": n_results, "include": INCLUDE}
        answer = await self._request("POST", await self._of(collection_id, "query"), asked)
        return answer if isinstance(answer, dict) else {}

    async def upsert(self, collection_id: str, columns: Mapping[str, Any]) -> None:
        await self._request("POST", await self._of(collection_id, "upsert"), columns)

    async def get(self, collection_id: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rows by id or position, as in Chroma's ``get``."""
        answer = await self._request("POST", await self._of(collection_id, "get"), asked)
        return answer if isinstance(answer, dict) else {}

    async def existing(self, collection_id: str, ids: Sequence[str]) -> Sequence[str]:
        answer = await self.get(collection_id, {"ids": ids, "limit": len(ids), "include": ()})
        try:
            return [str(own_id) for own_id in answer["ids"]]
        except (KeyError, TypeError) as error:
            raise malformed(self._name) from error

    async def count(self, collection_id: str) -> int:
        answer = await self._request("GET", await self._of(collection_id, "count"))
        if not isinstance(answer, int):
            raise malformed(self._name)
        return answer

    async def aclose(self) -> None:
        session, self._session, self._root = self._session, None, None
        if session is not None:
            if self._loop is asyncio.get_running_loop():
                await session.close()
            else:
                session.detach()

    async def _of(self, collection_id: str, method: str) -> str:
        return f"{await self._database_root()}/collections/{collection_id}/{method}"

    async def _database_root(self) -> str:
        """The path of the tenant's database; a Chroma Cloud key names both if it can access only one."""
        if self._root is None:
            tenant, database = self._address.tenant, self._address.database
            if tenant is None or database is None:
                identity = await self._request("GET", "/auth/identity")
                tenant, database = _only_database(self._name, identity, tenant, database)
            self._root = f"/tenants/{quote(tenant, safe='')}/databases/{quote(database, safe='')}"
        return self._root

    async def _check_database(self, root: str) -> None:
        """Reports a missing database or tenant as such, after a collection was not found.

        Raises:
            StoreError: the database or tenant does not exist.
        """
        try:
            await self._request("GET", root)
        except MissingCollection as error:
            raise StoreError(
                f"{self._name}: the database does not exist: check tenant and database", is_fatal=True
            ) from error

    async def _request(self, method: Literal["GET", "POST"], path: str, body: Mapping[str, Any] | None = None) -> Any:
        if self._session is None:
            raise StoreError(f"{self._name} is not open")
        try:
            async with self._session.request(
                method,
                f"{self._address.url}/api/v2{path}",
                data=self._encode(body),
                proxy=self._proxy,
                allow_redirects=False,  # would send tokens to another host; aiohttp withholds only `Authorization`
            ) as answer:
                content = await answer.read()
                if answer.status >= 300:
                    raise fault_of_answer(self._name, answer.status, answer.headers, content)
                return orjson.loads(content)
        except SearchError:
            raise
        except aiohttp.ClientResponseError as error:  # holds the request headers, including tokens
            raise fault_of_exception(self._name, error) from None
        except Exception as error:
            raise fault_of_exception(self._name, error) from error

    def _encode(self, body: Mapping[str, Any] | None) -> bytes | BytesIO | None:
        if body is None:
            return None
        try:
            encoded = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
            return encoded if len(encoded) <= WHOLE_BYTES else BytesIO(encoded)
        except orjson.JSONEncodeError as error:
            raise RefusedInput(f"{self._name}: a request cannot be encoded: its text is not valid Unicode") from error


def _only_database(name: str, identity: Any, tenant: str | None, database: str | None) -> tuple[str, str]:
    found = identity if isinstance(identity, dict) else {}
    tenant = tenant or str(found.get("tenant") or "")
    databases = [database] if database else [str(each) for each in found.get("databases") or () if each != "*"]
    if not tenant or tenant == "*" or len(databases) != 1:
        raise StoreError(
            f"{name}: the credentials can access {len(databases) or 'no named'} databases: pass tenant and database "
            "(for Chroma Cloud, CHROMA_TENANT and CHROMA_DATABASE)",
            is_fatal=True,
        )
    return tenant, databases[0]
