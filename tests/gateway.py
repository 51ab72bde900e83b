"""A real HTTP gateway in a thread: before a service, or as the proxy of the environment; it can fail, be silent, or come back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["pass", "fail", "silent", "sick"]


class Gateway:
    """Passes connections on; see :func:`gateway`.

    Args:
        target: URL of the service that it stands before; None makes it a proxy, which goes where a request says.
    """

    def __init__(self, target: str | None) -> None:
        self._target = target
        self._mode: Mode = "pass"
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._is_up, self._end = threading.Event(), asyncio.Event()
        self.requests: list[str] = []
        """The first line of each connection's first request."""
        self.url = ""
        self.names: dict[str, str] = {}
        """Addresses of hosts that only a proxy knows."""

    def switch(self, mode: Mode) -> None:
        """``fail`` answers everything with 500, ``sick`` only health checks, ``silent`` nothing at all; open connections are cut."""

        def cut() -> None:
            self._mode = mode
            for writer in self._open:
                writer.transport.abort()

        self._loop.call_soon_threadsafe(cut)

    def run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)

    def wait(self) -> None:
        assert self._is_up.wait(10)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._is_up.set()
        await self._end.wait()
        server.close()
        for writer in self._open:
            writer.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head.split(b"\r\n")[0].decode())
                if self._mode == "silent":
                    await reader.read()
                elif self._mode == "fail" or (self._mode == "sick" and b"/healthz" in head.split(b"\r\n")[0]):
                    answer = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\nconnection: close\r\n\r\ndown"
                    writer.write(answer)
                    await writer.drain()
                else:
                    await self._pass_on(head, reader, writer)
        finally:
            self._open.discard(writer)
            writer.close()

    async def _pass_on(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parts = urlsplit(self._target or head.split(b" ")[1].decode())
        host = parts.hostname or ""
        there, to_there = await asyncio.open_connection(self.names.get(host, host), parts.port)
        self._open.add(to_there)
        try:
            to_there.write(head)
            await asyncio.gather(_copy(reader, to_there), _copy(there, writer))
        finally:
            self._open.discard(to_there)
            to_there.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    finally:
        with suppress(OSError):
            writer.close()


@contextmanager
def gateway(target: str | None = None) -> Iterator[Gateway]:
    """Serves on a thread of its own while the block runs."""
    made = Gateway(target)
    thread = threading.Thread(target=made.run, name="gateway")
    thread.start()
    made.wait()
    try:
        yield made
    finally:
        made.end()
        thread.join(10)
