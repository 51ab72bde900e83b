"""Framed messages over a socket pair between two processes of one user."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

MAX_MESSAGE = 1 << 30
"""Bytes. A longer frame means that the stream is corrupt."""
_LENGTH = struct.Struct(">I")
_PIECE = 1 << 18
_HIGH_WATER = 1 << 20
"""Unread bytes at which :meth:`Channel.send` waits."""

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class ChannelClosedError(Exception):
    """The other side is gone, or the stream is corrupt."""


def frame(message: object) -> bytes:
    """Serializes a message: length of its pickle (4 bytes, big-endian), then the pickle."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Incremental decoder of framed messages; pure."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def is_between(self) -> bool:
        """No partial message is buffered, so the stream may end here."""
        return not self._buffer

    def feed(self, piece: bytes) -> Iterator[Any]:
        """Yields the messages completed by this piece.

        Raises:
            ChannelClosedError: the stream is corrupt and cannot be read further.
        """
        self._buffer += piece
        begin = 0
        try:
            while len(self._buffer) - begin >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, begin)
                if length > MAX_MESSAGE:
                    raise ChannelClosedError(f"a message of {length} bytes: the stream is corrupt")
                end = begin + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                with memoryview(self._buffer) as view, view[begin + _LENGTH.size : end] as body:
                    try:
                        message = pickle.loads(body)
                    except Exception as error:  # a corrupt pickle can raise anything
                        raise ChannelClosedError(f"a message cannot be read ({type(error).__name__})") from None
                begin = end
                yield message
        finally:
            del self._buffer[:begin]


class Channel(Generic[Sent, Received]):
    """One end of the socket pair; sends and receives whole messages in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = Frames()
        self._received: deque[Received] = deque()
        writer.transport.set_write_buffer_limits(high=_HIGH_WATER)

    @classmethod
    async def over(cls, end: socket.socket) -> Channel[Sent, Received]:
        """Takes ownership of one socket of the pair."""
        end.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer)

    def post(self, message: Sent) -> None:
        """Sends without waiting; ignored if the other side is gone."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def send(self, message: Sent) -> None:
        """Sends, waiting while the other side lags far behind. If cancelled, the message is sent anyway.

        Raises:
            ChannelClosedError: the other side is gone.
        """
        self.post(message)
        try:
            await self._writer.drain()
        except OSError:
            raise ChannelClosedError("the other side is gone") from None

    async def receive(self) -> Received:
        """The next message. Cancelling it loses none.

        Raises:
            ChannelClosedError: the other side is gone, or the stream is corrupt.
        """
        while not self._received:
            try:
                piece = await self._reader.read(_PIECE)
            except OSError:
                piece = b""
            if not piece:
                raise ChannelClosedError("the other side is gone")
            self._received.extend(self._frames.feed(piece))
        return self._received.popleft()

    def close(self) -> None:
        """Closes immediately, after everything already sent."""
        self._writer.close()

    async def aclose(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
