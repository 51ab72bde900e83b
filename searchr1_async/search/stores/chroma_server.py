"""A collection of a Chroma server, or of Chroma Cloud, over HTTP API v2 (documented at ``/docs`` of any server)."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self
from urllib.parse import quote

import orjson
from yarl import URL

from searchr1_async.errors import ConfigurationError, SearchError, StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import MissingCollection, RefusedInput, Wording, malformed, wrong_dimension
from searchr1_async.search.http_session import HttpSession, error_in, header_token
from searchr1_async.search.stores.chroma import INCLUDE, NEW_COLLECTION, ChromaStore, CollectionModel, for_good

DEFAULT_TENANT = "default_tenant"
DEFAULT_DATABASE = "default_database"
CLOUD_HOST = "api.trychroma.com"
PAGE = 1_000
"""Rows per request: 16 MB at 3,072 dimensions; a server accepts 40 MB."""
CLOUD_PAGE = 300
"""Rows per request: Chroma Cloud's quota of records written and of results read (docs.trychroma.com/cloud/quotas-limits)."""
CLOUD_REQUESTS = 10
"""Chroma Cloud's quota of concurrent reads per collection."""


class _Server(HttpSession):
    """One database of a Chroma server, with its own connection pool.

    Replaces ``chromadb``'s async client, which takes several times the CPU, shares connections and headers between clients of an
    event loop, has no timeout, and drops the status and ``Retry-After`` of errors (chromadb 1.5.9).
    """

    def fault_of_answer(self, status: int, headers: Mapping[str, str], body: bytes) -> SearchError:
        kind, said = error_in(body)
        if status == 404 and kind == "NotFoundError":
            return MissingCollection(
                f"{self.name} does not exist, or was recreated since it was opened: check its name, tenant and database, or serve "
                "the folder that holds it (`chroma run --path <folder>`)"
            )
        return wrong_dimension(self.name, said) or super().fault_of_answer(status, headers, body)

    async def ask(self, method: Literal["GET", "POST"], path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request and its answer, as JSON."""
        try:
            sent = b"" if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        except orjson.JSONEncodeError as error:
            raise RefusedInput(f"{self.name}: a request cannot be encoded: its text is not valid Unicode") from error
        try:
            return orjson.loads(await self.request(method, f"/collections{path}", sent))
        except orjson.JSONDecodeError as error:
            raise malformed(self.name) from error


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
        tenant: str = DEFAULT_TENANT,
        database: str = DEFAULT_DATABASE,
        create: bool = False,
        timeout: float = 30.0,
    ) -> None:
        if not timeout > 0:
            raise ConfigurationError(f"timeout is {timeout} s: it must be above 0")
        url, sent = _url(host, port, ssl)
        name = f"Chroma collection {collection!r} at {_shown(url, tenant, database)}"
        if token is not None:
            sent["Authorization"] = f"Bearer {header_token(token)}"
        path = f"/tenants/{quote(tenant, safe='')}/databases/{quote(database, safe='')}"
        wording = Wording(
            name,
            StoreError,
            denied="set token (for Chroma Cloud CHROMA_API_KEY), and check that it has access to this tenant and database",
            missing="the server is not Chroma 0.6 or newer: check host and port",
            unreachable="check that `chroma run` is running, and its address",
        )
        headers = {**sent, **(headers or {}), "Content-Type": "application/json"}
        address, connections = f"{str(url).rstrip('/')}/api/v2{path}", self.max_requests + 2
        self._server = _Server(wording, address, headers, timeout=timeout, connections=connections)
        self._create = create
        super().__init__(name, collection, PAGE)

    @classmethod
    def cloud(
        cls,
        collection: str = "wiki_embeddings",
        *,
        api_key: str | None = None,
        tenant: str | None = None,
        database: str | None = None,
        host: str = CLOUD_HOST,
        **options: Any,
    ) -> Self:
        """A collection of Chroma Cloud.

        Args:
            collection: collection name; must exist, unless ``create``.
            api_key: None uses CHROMA_API_KEY.
            tenant: None uses CHROMA_TENANT.
            database: None uses CHROMA_DATABASE.
            host: Chroma Cloud's host, or a full URL.
            options: ``create`` and ``timeout`` of :class:`RemoteChroma`.

        Raises:
            StoreError: Chroma does not accept the collection name.
            ConfigurationError: no API key, tenant or database, or an invalid one.
        """
        given = {"CHROMA_API_KEY": api_key, "CHROMA_TENANT": tenant, "CHROMA_DATABASE": database}
        key, tenant, database = (value or os.environ.get(name, "") for name, value in given.items())
        if not (key and tenant and database):
            raise ConfigurationError(
                f"Chroma Cloud requires {', '.join(given)}: set them, or pass api_key, tenant, database"
            )
        address = {"ssl": "://" not in host, "tenant": tenant, "database": database}
        headers = {"X-Chroma-Token": header_token(key, "CHROMA_API_KEY")}
        store = cls(host, 443, collection, headers=headers, **address, **options)
        store.max_requests, store._page = CLOUD_REQUESTS, CLOUD_PAGE
        return store

    def _is_connected(self) -> bool:
        return self._server.is_open

    async def _connect(self) -> CollectionModel:
        await self._server.open()
        if self._create:
            made = {"name": self._collection_name, "configuration": NEW_COLLECTION, "get_or_create": True}
            answer = await self._server.ask("POST", "", made)
        else:
            answer = await self._server.ask("GET", f"/{self._collection_name}")
        try:
            return CollectionModel.of(
                answer["id"], answer.get("dimension"), answer.get("configuration_json"), answer.get("metadata")
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise malformed(self.name) from error

    async def _query(self, collection: str, vectors: Vectors, n_results: int) -> Mapping[str, Any]:
        asked = {"query_embeddings": vectors, "n_results": n_results, "include": INCLUDE}
        return await self._server.ask("POST", f"/{collection}/query", asked)

    async def _upsert(self, collection: str, columns: Mapping[str, Any]) -> None:
        await self._server.ask("POST", f"/{collection}/upsert", columns)

    async def get(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """The columns of rows by id or position, as in Chroma's ``get``. One request."""
        with for_good():
            answer = await self._server.ask("POST", f"/{self.model.id}/get", asked)
        if not isinstance(answer, dict) or not isinstance(answer.get("ids"), list):
            raise malformed(self.name)
        return answer

    async def _existing(self, collection: str, ids: Sequence[str]) -> Sequence[str]:
        return [str(own_id) for own_id in (await self.get({"ids": ids, "limit": len(ids), "include": ()}))["ids"]]

    async def _count(self, collection: str) -> int:
        answer = await self._server.ask("GET", f"/{collection}/count")
        if not isinstance(answer, int):
            raise malformed(self.name)
        return answer

    async def _disconnect(self) -> None:
        await self._server.aclose()


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


def _shown(url: URL, tenant: str, database: str) -> str:
    """For messages; omits the default tenant and database."""
    place = f"{url.host}:{url.port}{url.path.rstrip('/')}"
    is_default = (tenant, database) == (DEFAULT_TENANT, DEFAULT_DATABASE)
    return place if is_default else f"{place} (tenant {tenant!r}, database {database!r})"
