"""A collection of a Chroma server, or of Chroma Cloud, over HTTP API v2 (documented at ``/docs`` of any server)."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self
from urllib.parse import quote

import orjson
from yarl import URL

from searchr1_async.errors import ConfigurationError, StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import MissingCollection, RefusedInput, fault_of_answer, fault_of_exception, malformed
from searchr1_async.search.http_session import HttpSession, header_token
from searchr1_async.search.stores.chroma import INCLUDE, NEW_COLLECTION, ChromaStore, CollectionModel

DEFAULT_TENANT = "default_tenant"
DEFAULT_DATABASE = "default_database"
CLOUD_HOST = "api.trychroma.com"
PAGE = 1_000
"""Rows per request: 16 MB at 3,072 dimensions; a server accepts 40 MB."""
CLOUD_PAGE = 300
"""Rows per request: Chroma Cloud's quota of records written and of results read (docs.trychroma.com/cloud/quotas-limits)."""
CLOUD_REQUESTS = 10
"""Chroma Cloud's quota of concurrent reads per collection."""


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
        self._root: str | None = None
        self._session = HttpSession(
            f"{address.url}/api/v2",
            {**address.headers, "Content-Type": "application/json"},
            partial(fault_of_answer, name),
            partial(fault_of_exception, name),
            timeout=timeout,
            connections=connections,
        )

    @property
    def is_open(self) -> bool:
        return self._session.is_open

    async def open(self) -> None:
        if not self.is_open:
            self._root = None
            await self._session.open()

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
        self._root = None
        await self._session.aclose()

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
        if not self.is_open:
            raise StoreError(f"{self._name} is not open")
        content, _ = await self._session.request(method, path, b"" if body is None else self._encoded(body))
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise malformed(self._name) from error

    def _encoded(self, body: Mapping[str, Any]) -> bytes:
        try:
            return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
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


class RemoteChroma(ChromaStore):
    """A collection of a Chroma server (``chroma run --path <folder>``), over HTTP.

    Args:
        host: host name or address, or a full URL, which then sets port, ssl, user and password.
        port: TCP port.
        collection: collection name; must exist, unless ``create``.
        ssl: use HTTPS.
        headers: sent with every request; never logged.
        token: sent as ``Authorization: Bearer``, as chromadb's client does by default; if the server expects another header,
            pass that in ``headers`` (``{"X-Chroma-Token": ...}``). Never logged.
        tenant: the server's tenant.
        database: the tenant's database.
        create: create the collection, with cosine distance, if missing.
        timeout: seconds per request.

    Raises:
        StoreError: Chroma does not accept the collection name.
        ConfigurationError: an invalid address, token or timeout.
    """

    max_queries = 100
    max_requests = 32

    def __init__(
        self,
        host: str = "localhost",
        port: int = 8000,
        collection: str = "wiki_embeddings",
        *,
        ssl: bool = False,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        tenant: str | None = DEFAULT_TENANT,
        database: str | None = DEFAULT_DATABASE,
        create: bool = False,
        timeout: float = 30.0,
    ) -> None:
        if not timeout > 0:
            raise ConfigurationError(f"timeout is {timeout} s: it must be above 0")
        url, sent = _url(host, port, ssl)
        name = f"Chroma collection {collection!r} at {_shown(url, tenant, database)}"
        if token is not None:
            sent["Authorization"] = f"Bearer {header_token(token)}"
        address = Address(str(url).rstrip("/"), tenant, database, {**sent, **(headers or {})})
        server = ServerDatabase(name, address, create=create, connections=self.max_requests + 2, timeout=timeout)
        super().__init__(name, server, collection, PAGE)

    @classmethod
    def cloud(
        cls,
        collection: str = "wiki_embeddings",
        *,
        api_key: str | None = None,
        tenant: str | None = None,
        database: str | None = None,
        create: bool = False,
        timeout: float = 30.0,
        host: str = CLOUD_HOST,
        port: int = 443,
    ) -> Self:
        """A collection of Chroma Cloud.

        Args:
            collection: collection name; must exist, unless ``create``.
            api_key: None uses CHROMA_API_KEY.
            tenant: None uses CHROMA_TENANT, else the key's tenant.
            database: None uses CHROMA_DATABASE, else the only database the key can access.
            create: create the collection if missing.
            timeout: seconds per request.
            host: Chroma Cloud's host, or a full URL.
            port: TCP port, with TLS.

        Raises:
            StoreError: Chroma does not accept the collection name.
            ConfigurationError: no API key, or an invalid one.
        """
        key = api_key or os.environ.get("CHROMA_API_KEY")
        if not key:
            raise ConfigurationError("Chroma Cloud requires an API key: set CHROMA_API_KEY, or pass api_key")
        store = cls(
            host,
            port,
            collection,
            ssl="://" not in host,
            headers={"X-Chroma-Token": header_token(key, "CHROMA_API_KEY")},
            tenant=tenant or os.environ.get("CHROMA_TENANT") or None,
            database=database or os.environ.get("CHROMA_DATABASE") or None,
            create=create,
            timeout=timeout,
        )
        store.max_requests = CLOUD_REQUESTS
        store._page = CLOUD_PAGE
        return store


def _url(host: str, port: int, ssl: bool) -> tuple[URL, dict[str, str]]:
    """The server's URL without ``/api/v2``, and the headers for a user and password in it."""
    try:
        url = URL(host) if "://" in host else URL.build(scheme="https" if ssl else "http", host=host, port=port)
        bare = url.with_user(None).with_query(None).with_fragment(None)
    except (ValueError, TypeError):
        raise ConfigurationError("the Chroma host is not a valid name, address or URL: check it") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigurationError(f"a Chroma server needs http or https, not {url.scheme!r}: check the host")
    credentials = base64.b64encode(f"{url.user}:{url.password or ''}".encode()).decode()
    headers = {"Authorization": f"Basic {credentials}"} if url.user else {}
    return bare.with_path(url.path.rstrip("/").removesuffix("/api/v2")), headers


def _shown(url: URL, tenant: str | None, database: str | None) -> str:
    """For messages; omits the default tenant and database."""
    place = f"{url.host}:{url.port}{url.path.rstrip('/')}"
    named = [f"{kind} {of!r}" for kind, of in (("tenant", tenant), ("database", database)) if of]
    is_default = (tenant, database) == (DEFAULT_TENANT, DEFAULT_DATABASE)
    return f"{place} ({', '.join(named)})" if named and not is_default else place
