"""Whole messages over a pair of sockets between two processes of one user."""

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
"""Bytes. More is no message, but a stream out of step."""
_LENGTH = struct.Struct(">I")
_PIECE = 1 << 18
_HIGH_WATER = 1 << 20
"""Bytes that wait to be read by the other side before :meth:`Channel.send` waits too."""

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class ChannelClosedError(Exception):
    """The other side is gone, or the stream is out of step."""


def frame(message: object) -> bytes:
    """The bytes of a message: the length of its pickle (4 bytes, most significant first), and the pickle."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Puts the pieces of a stream together to messages; pure."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def is_between(self) -> bool:
        """Nothing of a further message has come: a stream that ends here was not cut."""
        return not self._buffer

    def feed(self, piece: bytes) -> Iterator[Any]:
        """The messages that are whole with this piece.

        Raises:
            ChannelClosedError: this is no message, and nothing behind it can be read either.
        """
        self._buffer += piece
        begin = 0
        try:
            while len(self._buffer) - begin >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, begin)
                if length > MAX_MESSAGE:
                    raise ChannelClosedError(f"a message of {length} bytes: the stream is out of step")
                end = begin + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                with memoryview(self._buffer) as view, view[begin + _LENGTH.size : end] as body:
                    try:
                        message = pickle.loads(body)
                    except Exception as error:  # whatever a pickle that is none can raise
                        raise ChannelClosedError(f"a message cannot be read ({type(error).__name__})") from None
                begin = end
                yield message
        finally:
            del self._buffer[:begin]


class Channel(Generic[Sent, Received]):
    """One end of the pair: sends whole messages, and receives them in the order in which they were sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = Frames()
        self._received: deque[Received] = deque()
        writer.transport.set_write_buffer_limits(high=_HIGH_WATER)

    @classmethod
    async def over(cls, end: socket.socket) -> Channel[Sent, Received]:
        """Takes one socket of a pair over, and closes it with the channel."""
        end.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer)

    def post(self, message: Sent) -> None:
        """Sends without waiting for anything; to a side that is gone it sends nothing."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def send(self, message: Sent) -> None:
        """Sends, and waits while the other side is far behind. Cancelled, it has been sent all the same.

        Raises:
            ChannelClosedError: the other side is gone.
        """
        self.post(message)
        try:
            await self._writer.drain()
        except OSError:
            raise ChannelClosedError("the other side is gone") from None

    async def receive(self) -> Received:
        """The next message. Cancelled, it has lost none.

        Raises:
            ChannelClosedError: the other side is gone, or the stream is out of step.
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
        """Closes at once; the other side sees the end of the stream after what was sent before."""
        self._writer.close()

    async def aclose(self) -> None:
        """Closes, and waits until that is done."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
