"""What a pool and its workers say to each other. All are frozen, and small: what the other side knows is not sent again."""

from __future__ import annotations

from dataclasses import dataclass, field

from searchr1_async.config import EpisodeLimits, FirstTurn, SamplingSettings
from searchr1_async.episodes.methods import Method
from searchr1_async.episodes.types import Passage, SearchCall, StopReason, Turn
from searchr1_async.rollout.gate import GateStatistics
from searchr1_async.rollout.limit import LimitSettings
from searchr1_async.rollout.player import GroupTask
from searchr1_async.rollout.pulse import PulseReading


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs to play, but for the weights: the arguments of ``make_dialect`` and of ``LocalPlayer``."""

    format_name: str
    """``"hermes"`` or ``"tags"``."""
    model_name: str
    """As the Tinker service calls it; chooses the renderer."""
    tokenizer: str
    """The folder or name that the tokenizer was loaded from (its ``name_or_path``)."""
    limits: EpisodeLimits
    renderer_name: str | None = None
    instructions: str | None = None
    first_turn: FirstTurn = "auto"
    samples: LimitSettings = field(default_factory=LimitSettings)
    """The bounds of how many samples a worker has in flight."""
    method: Method = "search"
    """How questions are put to the model."""


# -- from the pool --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message."""

    spec: WorkerSpec
    load_seconds: float
    """Seconds between two :class:`Load` messages."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampling client, as a process can take it."""

    handle: str
    """Of ``SamplingClient.get_sampler_handle``: names the sampler and the service, holds no credential."""
    api_key: str | None = field(repr=False)
    """None: the worker finds the credentials itself, where the parent found them."""
    version: int
    settings: SamplingSettings


@dataclass(frozen=True, slots=True)
class HoldPolicy:
    """A new policy, ``policy``, samples from ``sampler``."""

    policy: int
    sampler: Sampler


@dataclass(frozen=True, slots=True)
class DropPolicy:
    """Nobody plays it any more."""

    policy: int


@dataclass(frozen=True, slots=True)
class Play:
    """Play a group."""

    group: int
    """The number of this attempt to play it; unique within a pool."""
    task: GroupTask
    policy: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants this group any more; no answer is sent."""

    group: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Ask the sampler for nothing more, or, with False, go on."""

    is_paused: bool


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to a :class:`SearchAsked`."""

    group: int
    search: int
    results: tuple[tuple[Passage, ...], ...]


@dataclass(frozen=True, slots=True)
class SearchFailed:
    """A search that failed for good."""

    group: int
    search: int
    kind: str
    """The error's class, by its name in :mod:`searchr1_async.errors`."""
    message: str
    is_fatal: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """Cancel everything and end. A closed channel says the same."""


ToWorker = Setup | HoldPolicy | DropPolicy | Play | Cancel | Pause | Found | SearchFailed | Stop

# -- from a worker --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """It can play."""


@dataclass(frozen=True, slots=True)
class CannotStart:
    """It ends."""

    message: str


@dataclass(frozen=True, slots=True)
class SearchAsked:
    """An episode wants to search; answered by :class:`Found` or :class:`SearchFailed`."""

    group: int
    search: int
    """Its number; unique within a worker."""
    queries: tuple[str, ...]


Reference = tuple[int, int]
"""The passages that search ``[0]`` of the group found for its query ``[1]``: the pool has them."""


@dataclass(frozen=True, slots=True)
class Played:
    """A member's episode, without what the pool knows: the question, the passages, and a prompt sent before."""

    group: int
    member: int
    prompt_tokens: tuple[int, ...] | None
    """None: the same as the last one sent of this group."""
    turns: tuple[Turn, ...]
    """Without the results of their searches."""
    found: tuple[tuple[Reference | tuple[Passage, ...], ...], ...]
    """What each turn's search found; empty for a turn without results."""
    stop_reason: StopReason
    answer: str | None
    error: str | None
    seconds: float
    given: SearchCall | None = None
    """Without its results."""
    given_found: tuple[Reference | tuple[Passage, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A group is over: every member was sent, unless ``failure`` says what broke in the worker."""

    group: int
    failure: str | None = None
    """An unforeseen error's type and place; never its words, which may quote an episode."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is; sent now and then."""

    cpu_seconds: float
    """Of the process since it began, all threads."""
    pulse: PulseReading
    """Of its event loop, since the last message."""
    gate: GateStatistics


FromWorker = Ready | CannotStart | SearchAsked | Played | Ended | Load
