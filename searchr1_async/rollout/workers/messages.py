"""Messages between a pool and its workers. Frozen and small: what the other side already has is not sent again."""

from __future__ import annotations

from dataclasses import dataclass, field

from searchr1_async.config import EpisodeLimits, FirstTurn, SamplingSettings
from searchr1_async.episodes.prompts import Method
from searchr1_async.episodes.types import Passage, SearchCall, StopReason, Turn
from searchr1_async.models import Thinking
from searchr1_async.rollout.gate import GateStatistics
from searchr1_async.rollout.limit import LimitSettings
from searchr1_async.rollout.player import GroupTask
from searchr1_async.rollout.pulse import PulseReading


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
