"""Client side of a served search, as an embedder and a store. Each call is one request, tried once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal
from urllib.parse import unquote

import aiohttp
import anyio
import numpy as np
from yarl import URL

from searchr1_async.errors import ConfigurationError, EmbeddingError, SearchError, StoreError
from searchr1_async.search import faults as http_faults
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests
from searchr1_async.search.http_session import HttpSession, header_token
from searchr1_async.search.stores.vector_store import Found
from searchr1_async.search.wire import (
    DIMENSION_HEADER,
    EMBEDDER_HEADER,
    PROTOCOL,
    SERVICE,
    ServedFacts,
    dumps,
    loads,
    pack_vectors,
    unpack_found,
    unpack_vectors,
)

LONGEST_PAUSE = 2.0


class Connection:
    """HTTP session with a served search, reopenable. Permanent faults raise ``failure``; ``timeout`` is per request."""

    def __init__(self, url: str, token: str | None, failure: type[SearchError], *, timeout: float) -> None:
        self.url = str(_base(url)).rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {header_token(token)}"}
        self._failure = failure
        self._session = HttpSession(self.url, self._headers, self._fault_of, self._fault_of_exception, timeout=timeout)

    @property
    def name(self) -> str:
        return f"the search served at {self.url}"

    @property
    def is_open(self) -> bool:
        return self._session.is_open

    async def open(self) -> None:
        """Creates the session without sending a request."""
        await self._session.open()

    async def open_and_look(self) -> ServedFacts:
        """Opens, and closes again if the request fails."""
        await self.open()
        try:
            return await self.look()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise

    async def look(self) -> ServedFacts:
        """Describes what is served. Raises as :meth:`request`; fatal for another kind of service or a wrong token."""
        body, _ = await self.request("GET", "/health")
        try:
            answer = loads(body)
            service, protocol = answer["service"], answer["protocol"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._other_service() from error
        if service != SERVICE:
            raise self._other_service()
        if protocol != PROTOCOL:
            raise self._failure(
                f"{self.name} uses protocol {protocol}, this version of the package {PROTOCOL}: run the same version on both "
                "sides",
                is_fatal=True,
            )
        try:
            facts = ServedFacts.from_json(self.url, answer)
        except (KeyError, TypeError, ValueError) as error:
            raise http_faults.malformed(self.name) from error
        if not facts.is_authorized:
            raise self._refused_token()
        return facts

    async def request(
        self, method: Literal["GET", "POST"], path: str, body: bytes = b"", asked: Mapping[str, str] | None = None
    ) -> tuple[bytes, Mapping[str, str]]:
        """The body and headers of a successful answer.

        Raises PassingFault if transient, RefusedInput because of the body's content, else ``failure``.
        """
        if not self.is_open:
            raise self._failure(f"{self.name} is not open")
        return await self._session.request(method, path, body, asked)

    def _fault_of_exception(self, error: Exception) -> SearchError:
        if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientSSLError):
            return PassingFault(
                f"{self.name} does not answer ({type(error).__name__}): check that it is up and its address",
                cause="refused",
            )
        fault = http_faults.fault_of_exception(self.name, error)
        return fault if isinstance(fault, PassingFault) else self._failure(str(fault), is_fatal=fault.is_fatal)

    def _fault_of(self, status: int, headers: Mapping[str, str], body: bytes) -> SearchError:
        fault = http_faults.fault_of_answer(self.name, status, headers, b"")
        kind, said = http_faults.error_in(body)
        said = " ".join(said.split())[:300]
        because = f"{self.name}: {said or 'no reason given'} ({status}{f' {kind}' if kind else ''})"
        match fault:
            case TooManyRequests():
                return TooManyRequests(because, cause=fault.cause, retry_after=fault.retry_after)
            case PassingFault():
                return PassingFault(because, cause=fault.cause, retry_after=fault.retry_after)
            case RefusedInput() if kind != "dimension":
                return RefusedInput(because)
        if status in (401, 403):
            return self._refused_token()
        if status in (404, 405):
            return self._other_service()
        return self._failure(because, is_fatal=True)

    def _refused_token(self) -> SearchError:
        given = "refuses this token" if self._headers else "requires a token"
        return self._failure(f"{self.name} {given}: pass the token it was started with, token=", is_fatal=True)

    def _other_service(self) -> SearchError:
        return self._failure(
            f"{self.name}: this server is not `python -m searchr1_async serve`: check host and port (for a Chroma server, "
            "pass collection=)",
            is_fatal=True,
        )

    async def aclose(self) -> None:
        await self._session.aclose()


def _base(url: str) -> URL:
    try:
        found = URL(url)
        is_base = found.scheme in ("http", "https") and bool(found.host) and not found.query and not found.fragment
    except ValueError:
        is_base, found = False, URL()
    if not is_base or found.user is not None or found.password is not None:
        # Not quoted: it may contain a password.
        raise ConfigurationError(
            "the address of a served search must be a URL such as http://127.0.0.1:8200 (no user and password: pass token=)"
        )
    return found


async def look_at(url: str, token: str | None = None, deadline: float = 10.0) -> ServedFacts:
    """Describes the search served at a URL; waits for a service that is still starting.

    Args:
        url: as printed by ``python -m searchr1_async serve``.
        token: of the service; never logged.
        deadline: seconds.

    Raises:
        StoreError: no answer within the deadline, another kind of service, or a wrong token.
        ConfigurationError: malformed URL or token.
    """
    connection = Connection(url, token, StoreError, timeout=deadline)
    await connection.open()
    fault: PassingFault | None = None
    pause = 0.1
    try:
        with anyio.move_on_after(deadline):
            while True:
                try:
                    return await connection.look()
                except PassingFault as error:
                    fault = error
                await anyio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
    finally:
        with anyio.CancelScope(shield=True):
            await connection.aclose()
    raise StoreError(str(fault or f"{connection.name} did not answer within {deadline:g} s")) from fault


class ServedStore:
    """The store of a served search, as a :class:`~searchr1_async.search.stores.vector_store.Store`.

    Args:
        place: its URL, or the result of :func:`look_at`.
        token: of the service; never logged.
        timeout: seconds for a whole request.

    Raises:
        ConfigurationError: malformed URL or token.
    """

    def __init__(self, place: str | ServedFacts, token: str | None = None, *, timeout: float = 60.0) -> None:
        self._facts = place if isinstance(place, ServedFacts) else None
        self._connection = Connection(_url_of(place), token, StoreError, timeout=timeout)
        self._content: str | None = None

    @property
    def name(self) -> str:
        return self._connection.name

    @property
    def fingerprint(self) -> str:
        """Of the remote store, updated with every answer, so that a replaced store is noticed."""
        if self._content is None:
            raise StoreError(f"{self.name} is not open")
        return self._content

    @property
    def dimension(self) -> int | None:
        return None if self._content is None or self._facts is None else self._facts.dimension

    @property
    def max_queries(self) -> int:
        return 1 if self._facts is None else self._facts.max_queries

    @property
    def max_requests(self) -> int:
        return 1 if self._facts is None else self._facts.query_requests

    async def open(self) -> None:
        if self._content is not None and self._connection.is_open:
            return
        self._content = None
        self._facts = await self._connection.open_and_look()
        self._content = self._facts.store_fingerprint

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        if not len(vectors):
            return ()
        if not np.isfinite(vectors).all():
            raise RefusedInput(f"{self.name}: a query vector is not finite")
        asked = {"dimension": str(vectors.shape[1]), "n_results": str(n_results)}
        body, _ = await self._connection.request("POST", "/query", pack_vectors(vectors), asked)
        try:
            answer = loads(body)
            found, content = unpack_found(answer["found"]), str(answer["store"])
        except (KeyError, TypeError, ValueError) as error:
            raise http_faults.malformed(self.name) from error
        if len(found) != len(vectors):
            raise http_faults.malformed(self.name)
        self._content = content
        return found

    async def count(self) -> int:
        self._facts = await self._connection.look()
        self._content = self._facts.store_fingerprint
        return self._facts.passages

    async def aclose(self) -> None:
        self._content = None
        await self._connection.aclose()


class ServedEmbedder:
    """The embedder of a served search, as an :class:`~searchr1_async.search.embedders.Embedder`.

    Args:
        place: its URL, or the result of :func:`look_at`, with which the fingerprint is known before it is open.
        token: of the service; never logged.
        timeout: seconds for a whole request.

    Raises:
        ConfigurationError: malformed URL or token.
    """

    def __init__(self, place: str | ServedFacts, token: str | None = None, *, timeout: float = 60.0) -> None:
        self._facts = place if isinstance(place, ServedFacts) else None
        self._connection = Connection(_url_of(place), token, EmbeddingError, timeout=timeout)

    @property
    def name(self) -> str:
        return self._connection.name if self._facts is None else f"{self._facts.embedder} at {self._connection.url}"

    @property
    def fingerprint(self) -> str:
        """Of the remote embedder: its vectors mix with local ones. Raises EmbeddingError if not known yet."""
        return self._known.embedder_fingerprint

    @property
    def dimension(self) -> int:
        return self._known.dimension

    @property
    def max_texts(self) -> int:
        return 1 if self._facts is None else self._facts.max_texts

    @property
    def max_tokens(self) -> int | None:
        return None if self._facts is None else self._facts.max_tokens

    @property
    def max_requests(self) -> int:
        return 1 if self._facts is None else self._facts.embed_requests

    @property
    def _known(self) -> ServedFacts:
        if self._facts is None:
            raise EmbeddingError(
                f"the embedder of {self.name} is not known yet: open it, or create it from `await look_at(url)`"
            )
        return self._facts

    async def open(self) -> None:
        if self._connection.is_open:
            return
        facts = await self._connection.open_and_look()
        if self._facts is not None and facts.embedder_fingerprint != self._facts.embedder_fingerprint:
            with anyio.CancelScope(shield=True):
                await self._connection.aclose()
            raise self._model_changed()
        self._facts = facts

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return await self._embed(texts, "query")

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return await self._embed(texts, "passage")

    async def _embed(self, texts: Sequence[str], kind: Literal["query", "passage"]) -> Vectors:
        facts = self._known
        if not len(texts):
            return np.empty((0, facts.dimension), np.float32)
        body, headers = await self._connection.request("POST", "/embed", dumps({"texts": list(texts), "kind": kind}))
        if unquote(headers.get(EMBEDDER_HEADER, "")) != facts.embedder_fingerprint:
            raise self._model_changed()
        try:
            vectors = unpack_vectors(body, int(headers.get(DIMENSION_HEADER, "")))
        except ValueError as error:
            raise http_faults.malformed(self.name) from error
        if vectors.shape != (len(texts), facts.dimension):
            raise http_faults.malformed(self.name)
        return vectors

    def _model_changed(self) -> EmbeddingError:
        return EmbeddingError(f"{self.name} now embeds with another model: reopen the search", is_fatal=True)

    async def aclose(self) -> None:
        await self._connection.aclose()


def _url_of(place: str | ServedFacts) -> str:
    return place.url if isinstance(place, ServedFacts) else place
