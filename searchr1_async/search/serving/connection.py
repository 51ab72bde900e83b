"""HTTP session with a served search. Each call is one request, tried once, with its faults classified."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from io import BytesIO
from typing import Literal

import aiohttp
import anyio
from yarl import URL

from searchr1_async.boundary.network import proxy_for
from searchr1_async.errors import ConfigurationError, SearchError
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests
from searchr1_async.search.serving.wire import PROTOCOL, SERVICE, ServedFacts, loads
from searchr1_async.search.stores.chroma import faults as http_faults

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 30.0
"""Keep-alive; below the 60 s or more after which servers close idle connections."""
WHOLE_BYTES = 1 << 20
"""Longer bodies are streamed; aiohttp warns about those that are not."""


class Connection:
    """HTTP session with a served search, reopenable. Permanent faults raise ``failure``; ``timeout`` is per request."""

    def __init__(self, url: str, token: str | None, failure: type[SearchError], *, timeout: float) -> None:
        self._url = _base(url)
        self._headers = {} if token is None else {"Authorization": f"Bearer {_checked(token)}"}
        self._failure, self._timeout = failure, timeout
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._proxy: str | None = None

    @property
    def url(self) -> str:
        return str(self._url).rstrip("/")

    @property
    def name(self) -> str:
        return f"the search served at {self.url}"

    @property
    def is_open(self) -> bool:
        return self._session is not None and self._loop is asyncio.get_running_loop()

    async def open(self) -> None:
        """Creates the session without sending a request."""
        if self.is_open:
            return
        await self.aclose()
        self._loop = asyncio.get_running_loop()
        self._proxy = proxy_for(str(self._url))
        self._session = aiohttp.ClientSession(
            # The caller limits concurrency.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=CONNECT_SECONDS),
            headers=self._headers,
        )

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
        body, _ = await self.request("GET", "health")
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
        if self._session is None:
            raise self._failure(f"{self.name} is not open")
        try:
            async with self._session.request(
                method,
                self._url / path,
                params=asked,
                data=(body if len(body) <= WHOLE_BYTES else BytesIO(body)) if body else None,
                proxy=self._proxy,
                allow_redirects=False,
            ) as answer:
                content = await answer.read()
                if answer.status >= 300:
                    raise self._fault_of(answer.status, answer.headers, content)
                return content, answer.headers
        except SearchError:
            raise
        except aiohttp.ClientConnectorError as error:
            if isinstance(error, aiohttp.ClientSSLError):
                raise self._fault_of_exception(error) from error
            raise PassingFault(
                f"{self.name} does not answer ({type(error).__name__}): check that it is up and its address",
                cause="refused",
            ) from error
        except aiohttp.ClientResponseError as error:  # holds the request headers, and so the token
            raise self._fault_of_exception(error) from None
        except Exception as error:
            raise self._fault_of_exception(error) from error

    def _fault_of_exception(self, error: Exception) -> SearchError:
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
        session, self._session = self._session, None
        if session is not None:
            if self._loop is asyncio.get_running_loop():
                await session.close()
            else:  # left open by a closed event loop
                session.detach()


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


def _checked(token: str) -> str:
    """The token in a form that fits a header; errors do not quote it."""
    stripped = token.strip()
    if not stripped or not stripped.isascii() or not stripped.isprintable() or " " in stripped:
        raise ConfigurationError("invalid token: it is blank, or has spaces or non-ASCII characters")
    return stripped
