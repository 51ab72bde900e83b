"""Messages between a pool and its workers: pickled, over a socket pair between two processes of one user.

What the other side already has is not sent again: the question, a group's prompt, and passages that the pool's search found.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast

from searchr1_async.config import EpisodeLimits, FirstTurn
from searchr1_async.episodes.formats import Dialect, make_dialect
from searchr1_async.episodes.prompts import Method
from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall, Turn, shared_tokens
from searchr1_async.models import Thinking
from searchr1_async.rollout.event_loop import PulseReading
from searchr1_async.rollout.gate import GateStatistics
from searchr1_async.rollout.limit import LimitSettings
from searchr1_async.rollout.player import GroupTask, Sampler

Passages = tuple[Passage, ...]
Results = tuple[Passages, ...]
"""Passages per query."""
Reference = tuple[int, int]
"""Passages that the pool already has: (search number, query index)."""


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
    """First message; answered by :class:`Started`."""

    spec: WorkerSpec
    load_seconds: float
    """Seconds between :class:`Load` messages."""


@dataclass(frozen=True, slots=True)
class Play:
    """Starts a group."""

    group: int
    """Attempt number, unique within a pool."""
    task: GroupTask
    sampler: Sampler


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

    search: int
    results: Results


@dataclass(frozen=True, slots=True)
class SearchFailed:
    """A search failed permanently."""

    search: int
    kind: str
    """Name of the error class in :mod:`searchr1_async.errors`."""
    message: str
    is_fatal: bool


ToWorker = Setup | Play | Cancel | Pause | Found | SearchFailed
"""Closing the channel ends the worker."""

# -- from a worker --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The worker is ready, or cannot start and exits."""

    problem: str | None = None


@dataclass(frozen=True, slots=True)
class SearchAsked:
    """Requests a search; answered by :class:`Found` or :class:`SearchFailed`."""

    group: int
    search: int
    """Search number, unique within a worker."""
    queries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Played:
    """A member's episode, without what the pool has."""

    group: int
    member: int
    episode: Episode
    """Without its question and search results; without its prompt, if that is the last one sent for this group."""
    has_last_prompt: bool
    found: tuple[tuple[Reference | Passages, ...], ...]
    """Search results: those of ``episode.given``, then those of each turn; empty without any."""


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


FromWorker = Started | SearchAsked | Played | Ended | Load


MAX_MESSAGE = 1 << 30
"""Bytes. A longer message means that the stream is corrupt."""
_LENGTH = struct.Struct(">I")
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


class Channel(Generic[Sent, Received]):
    """One end of the socket pair; sends and receives whole messages in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._length: int | None = None
        """Length of the next message, once read."""
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
        try:
            if (length := self._length) is None:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if length > MAX_MESSAGE:
                    raise ChannelClosedError(f"a message of {length} bytes: the stream is corrupt")
                self._length = length
            body = await self._reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            raise ChannelClosedError("the other side is gone") from None
        self._length = None
        try:
            return pickle.loads(body)
        except Exception as error:  # a corrupt pickle can raise anything
            raise ChannelClosedError(f"a message cannot be read ({type(error).__name__})") from None

    def close(self) -> None:
        """Closes immediately, after everything already sent."""
        self._writer.close()

    async def aclose(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


# -- episodes ---------------------------------------------------------------------------------------------------------------

_NO_QUESTION = cast(Question, None)
"""Not sent."""


@dataclass(slots=True)
class Packer:
    """Worker side of one group."""

    group: int
    _prompt: tuple[int, ...] | None = None
    _known: dict[Passages, Reference] = field(default_factory=dict)

    def learn(self, search: int, results: Results) -> None:
        """Notes what the pool found."""
        for place, passages in enumerate(results):
            self._known.setdefault(passages, (search, place))

    def pack(self, member: int, episode: Episode) -> Played:
        """Packs a member's episode, not yet scored."""
        results = [() if call is None else call.results for call in _calls(episode)]
        has_last_prompt = episode.prompt_tokens == self._prompt
        self._prompt = episode.prompt_tokens
        return Played(
            self.group,
            member,
            _with(episode, _NO_QUESTION, () if has_last_prompt else self._prompt, [()] * len(results)),
            has_last_prompt,
            tuple(tuple(self._known.get(passages, passages) for passages in found) for found in results),
        )


@dataclass(slots=True)
class Unpacker:
    """Pool side of one group."""

    question: Question
    found: dict[int, Results] = field(default_factory=dict)
    """Results by search number."""
    _prompt: tuple[int, ...] = ()

    def unpack(self, played: Played) -> Episode:
        """Restores an episode; prompt and passages are shared objects."""
        if not played.has_last_prompt and played.episode.prompt_tokens != self._prompt:
            self._prompt = played.episode.prompt_tokens
        results = [tuple(map(self._passages, found)) for found in played.found]
        episode = _with(played.episode, self.question, self._prompt, results)
        return replace(episode, turns=tuple(map(_with_shared_tokens, episode.turns)))

    def _passages(self, item: Reference | Passages) -> Passages:
        match item:
            case (int(search), int(place)):
                return self.found[search][place]
            case _:
                return item


def _with_shared_tokens(turn: Turn) -> Turn:
    return replace(
        turn, sampled_tokens=shared_tokens(turn.sampled_tokens), appended_tokens=shared_tokens(turn.appended_tokens)
    )


def _calls(episode: Episode) -> list[SearchCall | None]:
    return [episode.given, *(turn.call for turn in episode.turns)]


def _with(episode: Episode, question: Question, prompt: tuple[int, ...], results: Sequence[Results]) -> Episode:
    """The episode with another question, prompt, and results of its calls, in the order of :func:`_calls`."""
    given, *calls = (
        call if call is None or call.results == found else replace(call, results=found)
        for call, found in zip(_calls(episode), results, strict=True)
    )
    turns = tuple(
        turn if call is turn.call else replace(turn, call=call) for turn, call in zip(episode.turns, calls, strict=True)
    )
    return replace(episode, question=question, prompt_tokens=prompt, turns=turns, given=given)
