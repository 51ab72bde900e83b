"""HTTP with one service: a session that can be reopened in another event loop. Each call is one request, tried once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from io import BytesIO
from typing import Literal

import aiohttp
import orjson

from searchr1_async.boundary.network import proxy_for
from searchr1_async.errors import ConfigurationError, SearchError
from searchr1_async.search.faults import Wording, retry_after, without_quotes

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 30.0
"""Keep-alive: searches come in waves. Below the 60 s or more after which servers and gateways close idle connections."""
WHOLE_BYTES = 1 << 20
"""Longer bodies are streamed; aiohttp warns about those that are not."""


class HttpSession:
    """Connections to one server, with its headers, which are never logged. Can be reopened in another event loop.

    Args:
        wording: of the service's faults.
        url: of the server; selects the proxy.
        headers: sent with every request.
        timeout: seconds per request, including the wait for a connection; None for no limit.
        connections: most at once, further requests wait; 0 for no limit.
    """

    def __init__(
        self, wording: Wording, url: str, headers: Mapping[str, str], *, timeout: float | None, connections: int = 0
    ) -> None:
        self.wording, self.url = wording, url
        self._headers = _Private(headers)
        self._timeout, self._connections = timeout, connections
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def name(self) -> str:
        return self.wording.name

    @property
    def is_open(self) -> bool:
        return self._session is not None and self._loop is asyncio.get_running_loop()

    async def open(self) -> None:
        """Creates the session without sending a request. Idempotent."""
        if self.is_open:
            return
        await self.aclose()
        self._loop = asyncio.get_running_loop()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=CONNECT_SECONDS),
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=proxy_for(self.url),  # looked up once: aiohttp's "trust_env" uses a thread per request
        )

    @property
    def client(self) -> aiohttp.ClientSession:
        """The open session, for a library that sends its own requests."""
        if not self.is_open or self._session is None:
            raise self.wording.failure(f"{self.name} is not open")
        return self._session

    async def request(self, method: Literal["GET", "POST"], path: str, body: bytes = b"") -> bytes:
        """The body of a successful answer; ``path`` follows the server's URL.

        Redirects are not followed: they would send tokens to another host, since aiohttp withholds only ``Authorization``.

        Raises:
            PassingFault: worth a retry.
            RefusedInput: because of the body's content.
            SearchError: permanent, as ``Wording.failure``.
        """
        data = (body if len(body) <= WHOLE_BYTES else BytesIO(body)) if body else None
        try:
            async with self.client.request(method, f"{self.url}{path}", data=data, allow_redirects=False) as answer:
                content = await answer.read()
                if answer.status >= 300:
                    raise self.fault_of_answer(answer.status, answer.headers, content)
                return content
        except SearchError:
            raise
        except Exception as error:
            # An answer that breaks HTTP comes with the request's headers, and so the token: it is not passed on.
            cause = None if isinstance(error, aiohttp.ClientResponseError) else error
            raise self.wording.of_exception(error) from cause

    def fault_of_answer(self, status: int, headers: Mapping[str, str], body: bytes) -> SearchError:
        """The fault of an answer of status 300 or above."""
        said = without_quotes(": ".join(part for part in error_in(body) if part))
        return self.wording.of_status(status, said, retry_after(headers))

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            if self._loop is asyncio.get_running_loop():
                await session.close()
            else:  # left open by a closed event loop, and its connections with it
                session.detach()


class _Private(dict[str, str]):
    """Headers whose values are never shown."""

    def __repr__(self) -> str:
        return f"headers {', '.join(self)}"


def header_token(secret: str, what: str = "token") -> str:
    """The secret, stripped; messages never contain it. Raises ConfigurationError if it does not fit a header."""
    stripped = secret.strip()
    if not stripped or not stripped.isascii() or not stripped.isprintable() or " " in stripped:
        raise ConfigurationError(f"invalid {what}: it is blank, or has spaces or non-ASCII characters")
    return stripped


def error_in(body: bytes) -> tuple[str, str]:
    """Kind and text of ``{"error": …, "message": …}``; both empty for anything else, such as a gateway's page."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "", ""
    if not isinstance(found, dict) or not re.fullmatch(r"\w{1,60}", str(found.get("error", "")), re.ASCII):
        return "", ""
    return str(found["error"]), str(found.get("message", ""))
