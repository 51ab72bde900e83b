"""A session with a search that another process or machine serves: each call one request, tried once, its faults sorted."""

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
"""A connection that rests for longer is closed: servers close theirs after 60 s and more."""
WHOLE_BYTES = 1 << 20
"""A longer body is sent piece by piece; aiohttp warns of one that is not."""


class Connection:
    """A session with a served search; opened and closed any number of times, from one event loop at a time.

    Args:
        failure: what a fault that does not pass is raised as.
        timeout: seconds for a whole request.
    """

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
        """Asks nothing yet."""
        if self.is_open:
            return
        await self.aclose()
        self._loop = asyncio.get_running_loop()
        self._proxy = proxy_for(str(self._url))
        self._session = aiohttp.ClientSession(
            # No limit of its own: its user keeps to what the service takes.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=CONNECT_SECONDS),
            headers=self._headers,
        )

    async def open_and_look(self) -> ServedFacts:
        """Opens, and closes again where it is not answered."""
        await self.open()
        try:
            return await self.look()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise

    async def look(self) -> ServedFacts:
        """What is served.

        Raises:
            PassingFault, SearchError: as :meth:`request`; fatal where it is no search of ours, or wants another token.
        """
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
                f"{self.name} speaks protocol {protocol}, and this version of the package {PROTOCOL}: run the same version on "
                "both sides",
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
        """The body and the headers of an answer of success.

        Raises:
            PassingFault: this time.
            RefusedInput: because of something in the body.
            SearchError: as ``failure``, for good.
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
                f"{self.name} does not answer ({type(error).__name__}): check that it is up, and where", cause="refused"
            ) from error
        except aiohttp.ClientResponseError as error:  # it holds the headers of the request, and a token with them
            raise self._fault_of_exception(error) from None
        except Exception as error:
            raise self._fault_of_exception(error) from error

    def _fault_of_exception(self, error: Exception) -> SearchError:
        fault = http_faults.fault_of_exception(self.name, error)
        return fault if isinstance(fault, PassingFault) else self._failure(str(fault), is_fatal=fault.is_fatal)

    def _fault_of(self, status: int, headers: Mapping[str, str], body: bytes) -> SearchError:
        """The fault that an answer without success is."""
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
        given = "refuses this token" if self._headers else "wants a token"
        return self._failure(f"{self.name} {given}: give token=, the one that it was started with", is_fatal=True)

    def _other_service(self) -> SearchError:
        return self._failure(
            f"{self.name}: there is a server, but none of `python -m searchr1_async serve`: check host and port (for a "
            "Chroma server name its collection=)",
            is_fatal=True,
        )

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            if self._loop is asyncio.get_running_loop():
                await session.close()
            else:  # left open by an event loop that is gone, and its connections with it
                session.detach()


def _base(url: str) -> URL:
    try:
        found = URL(url)
        is_base = found.scheme in ("http", "https") and bool(found.host) and not found.query and not found.fragment
    except ValueError:
        is_base, found = False, URL()
    if not is_base or found.user is not None or found.password is not None:
        # Not quoted: it may hold a password.
        raise ConfigurationError(
            "the address of a served search is no URL such as http://127.0.0.1:8200 (without user and password: give token=)"
        )
    return found


def _checked(token: str) -> str:
    """The token, which is in no message, as a header can hold it."""
    stripped = token.strip()
    if not stripped or not stripped.isascii() or not stripped.isprintable() or " " in stripped:
        raise ConfigurationError("token is no token: it is blank, or holds spaces or characters beyond ASCII")
    return stripped
