"""HTTP with one service: a session that can be reopened in another event loop. Each call is one request, tried once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Literal

import aiohttp

from searchr1_async.boundary.network import proxy_for
from searchr1_async.errors import ConfigurationError, SearchError

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 30.0
"""Keep-alive; below the 60 s or more after which servers and gateways close idle connections."""
WHOLE_BYTES = 1 << 20
"""Longer bodies are streamed; aiohttp warns about those that are not."""

FaultOfAnswer = Callable[[int, Mapping[str, str], bytes], SearchError]
"""The fault of an answer's status (300 or above), headers and body."""
FaultOfException = Callable[[Exception], SearchError]


class HttpSession:
    """Connections to one server, with its headers.

    Args:
        url: of the server; selects the proxy.
        headers: sent with every request; never logged.
        fault_of_answer: classifies answers of status 300 and above. Redirects are not followed: they would send tokens to
            another host, since aiohttp withholds only ``Authorization``.
        fault_of_exception: classifies requests without an answer.
        timeout: seconds per request, including the wait for a connection.
        connections: most at once, further requests wait; 0 for no limit.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        fault_of_answer: FaultOfAnswer,
        fault_of_exception: FaultOfException,
        *,
        timeout: float,
        connections: int = 0,
    ) -> None:
        self._url, self._headers = url, headers
        self._fault_of_answer, self._fault_of_exception = fault_of_answer, fault_of_exception
        self._timeout, self._connections = timeout, connections
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._proxy: str | None = None

    @property
    def is_open(self) -> bool:
        return self._session is not None and self._loop is asyncio.get_running_loop()

    async def open(self) -> None:
        """Creates the session without sending a request. Idempotent."""
        if self.is_open:
            return
        await self.aclose()
        self._loop = asyncio.get_running_loop()
        # Looked up once: aiohttp's "trust_env" uses a thread per request.
        self._proxy = proxy_for(self._url)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=CONNECT_SECONDS),
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def request(
        self, method: Literal["GET", "POST"], path: str, body: bytes = b"", parameters: Mapping[str, str] | None = None
    ) -> tuple[bytes, Mapping[str, str]]:
        """The body and headers of a successful answer; ``path`` follows the server's URL. Raises the classified faults."""
        session = self._session
        assert session is not None, "the session is open"
        try:
            async with session.request(
                method,
                f"{self._url}{path}",
                params=parameters,
                data=(body if len(body) <= WHOLE_BYTES else BytesIO(body)) if body else None,
                proxy=self._proxy,
                allow_redirects=False,
            ) as answer:
                content = await answer.read()
                if answer.status >= 300:
                    raise self._fault_of_answer(answer.status, answer.headers, content)
                return content, answer.headers
        except SearchError:
            raise
        except aiohttp.ClientResponseError as error:  # holds the request headers, and so the token
            raise self._fault_of_exception(error) from None
        except Exception as error:
            raise self._fault_of_exception(error) from error

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            if self._loop is asyncio.get_running_loop():
                await session.close()
            else:  # left open by a closed event loop, and its connections with it
                session.detach()


def header_token(secret: str, what: str = "token") -> str:
    """The secret, stripped; messages never contain it. Raises ConfigurationError if it does not fit a header."""
    stripped = secret.strip()
    if not stripped or not stripped.isascii() or not stripped.isprintable() or " " in stripped:
        raise ConfigurationError(f"invalid {what}: it is blank, or has spaces or non-ASCII characters")
    return stripped
