"""A collection of a Chroma server, or of Chroma Cloud."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from typing import Self

from yarl import URL

from searchr1_async.errors import ConfigurationError
from searchr1_async.search.stores.chroma.server import Address, ServerDatabase
from searchr1_async.search.stores.chroma.store import ChromaStore

DEFAULT_TENANT = "default_tenant"
DEFAULT_DATABASE = "default_database"
CLOUD_HOST = "api.trychroma.com"
PAGE = 1_000
"""Rows per request: 16 MB at 3,072 dimensions; a server accepts 40 MB."""
CLOUD_PAGE = 300
"""Rows per request: Chroma Cloud's quota of records written and of results read (docs.trychroma.com/cloud/quotas-limits)."""
CLOUD_REQUESTS = 10
"""Chroma Cloud's quota of concurrent reads per collection."""


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
            sent["Authorization"] = f"Bearer {_checked(token, 'token')}"
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
            headers={"X-Chroma-Token": _checked(key, "CHROMA_API_KEY")},
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


def _checked(secret: str, what: str) -> str:
    """The secret, stripped, if valid in a header; messages never contain it."""
    stripped = secret.strip()
    if not stripped or not stripped.isascii() or not stripped.isprintable() or " " in stripped:
        raise ConfigurationError(f"{what} is not a valid token: it is blank, or has spaces or non-ASCII characters")
    return stripped
