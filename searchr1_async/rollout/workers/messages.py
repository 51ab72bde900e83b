"""Messages between a pool and its workers, framed and pickled over a socket pair between two processes of one user.

Small: what the other side already has is not sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from searchr1_async.config import EpisodeLimits, FirstTurn, SamplingSettings
from searchr1_async.episodes.formats import Dialect, make_dialect
from searchr1_async.episodes.prompts import Method
from searchr1_async.episodes.types import Passage, SearchCall, StopReason, Turn
from searchr1_async.models import Thinking
from searchr1_async.rollout.event_loop import PulseReading
from searchr1_async.rollout.gate import GateStatistics
from searchr1_async.rollout.limit import LimitSettings
from searchr1_async.rollout.player import GroupTask


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Everything a worker needs except the weights: the arguments of ``make_dialect`` and ``LocalPlayer``."""

    format_name: str
    """``"hermes"`` or ``"tags"``."""
    model_name: str
    """Model name at the Tinker service; chooses the renderer."""
    tokenizer: str
    """Folder or name the tokenizer was loaded from (its ``name_or_path``)."""
    limits: EpisodeLimits
    renderer_name: str | None = None
    instructions: str | None = None
    first_turn: FirstTurn = "auto"
    samples: LimitSettings = field(default_factory=LimitSettings)
    method: Method = "search"
    thinking: Thinking = None

    def dialect(self, tokenizer: Any) -> Dialect:
        """The dialect of every process, with the loaded tokenizer.

        Raises:
            ModelError: no such format, or no renderer fits.
        """
        return make_dialect(
            *(self.format_name, self.model_name, tokenizer),
            renderer_name=self.renderer_name,
            thinking=self.thinking,
            instructions=self.instructions,
            method=self.method,
        )


# -- from the pool --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setup:
    """First message."""

    spec: WorkerSpec
    load_seconds: float
    """Seconds between :class:`Load` messages."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampling client in serializable form."""

    handle: str
    """From ``SamplingClient.get_sampler_handle``: identifies sampler and service, contains no credentials."""
    api_key: str | None = field(repr=False)
    """None: the worker finds the credentials the same way as the parent."""
    version: int
    settings: SamplingSettings


@dataclass(frozen=True, slots=True)
class HoldPolicy:
    """Registers policy ``policy``, which samples from ``sampler``."""

    policy: int
    sampler: Sampler


@dataclass(frozen=True, slots=True)
class DropPolicy:
    """Releases a policy that is no longer used."""

    policy: int


@dataclass(frozen=True, slots=True)
class Play:
    """Starts a group."""

    group: int
    """Attempt number, unique within a pool."""
    task: GroupTask
    policy: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancels a group; no answer is sent."""

    group: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Pauses new sampling requests, or resumes them with False."""

    is_paused: bool


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to a :class:`SearchAsked`."""

    group: int
    search: int
    results: tuple[tuple[Passage, ...], ...]


@dataclass(frozen=True, slots=True)
class SearchFailed:
    """A search failed permanently."""

    group: int
    search: int
    kind: str
    """Name of the error class in :mod:`searchr1_async.errors`."""
    message: str
    is_fatal: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """Cancels everything and exits, as does a closed channel."""


ToWorker = Setup | HoldPolicy | DropPolicy | Play | Cancel | Pause | Found | SearchFailed | Stop

# -- from a worker --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker is ready."""


@dataclass(frozen=True, slots=True)
class CannotStart:
    """The worker cannot start, and exits."""

    message: str


@dataclass(frozen=True, slots=True)
class SearchAsked:
    """Requests a search; answered by :class:`Found` or :class:`SearchFailed`."""

    group: int
    search: int
    """Search number, unique within a worker."""
    queries: tuple[str, ...]


Reference = tuple[int, int]
"""Passages that the pool already has: (search number, query index)."""


@dataclass(frozen=True, slots=True)
class Played:
    """A member's episode, without what the pool has: the question, passages, and a prompt sent before."""

    group: int
    member: int
    prompt_tokens: tuple[int, ...] | None
    """None: same as the last one sent for this group."""
    turns: tuple[Turn, ...]
    """Without search results."""
    found: tuple[tuple[Reference | tuple[Passage, ...], ...], ...]
    """Search results per turn; empty for a turn without results."""
    stop_reason: StopReason
    answer: str | None
    error: str | None
    seconds: float
    given: SearchCall | None = None
    """Without search results."""
    given_found: tuple[Reference | tuple[Passage, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A group has ended: all members were sent, unless ``failure`` is set."""

    group: int
    failure: str | None = None
    """Type and location of an unexpected error, without its message, which may quote an episode."""


@dataclass(frozen=True, slots=True)
class Load:
    """Load report of a worker."""

    cpu_seconds: float
    """CPU seconds of the process, over all threads."""
    pulse: PulseReading
    """Event loop reading since the last report."""
    gate: GateStatistics


FromWorker = Ready | CannotStart | SearchAsked | Played | Ended | Load


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
