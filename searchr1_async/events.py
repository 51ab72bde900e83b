"""Events of a run: the one interface through which the engine is observed.

The engine calls ``emit(event)``; metrics, records, views and trackers subscribe. ``emit`` never blocks and never raises into the
engine: :class:`Watchers` isolates failures of subscribers. :class:`EventStreams` turns the events into async iterators.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakSet

import anyio
import msgspec

from searchr1_async.billing import TokenUsage
from searchr1_async.episodes.types import DropReason, Episode, Group
from searchr1_async.models import Price

logger = logging.getLogger(__name__)

MAX_QUEUED = 4096
"""Maximum events buffered per reader: some hold an episode of 50 KB or more."""


class Event(msgspec.Struct, frozen=True):
    """Base class of all events."""


class RunStarted(Event, frozen=True):
    """The services are open and work starts. Index building, which needs no model, may come before."""

    kind: Literal["train", "evaluate", "rollout"]
    model: str
    """The Tinker service's name of the model, which is also its key in the price table."""
    is_embedded: bool
    """The model runs in the embedded service on this machine and costs nothing."""
    embedder: str
    """Name of the search's embedder."""
    out_dir: str | None = None
    """The run's folder; None for work without one."""
    step: int = 0
    """Optimizer steps done before; above 0 in a resumed run."""
    total_steps: int | None = None
    group_size: int = 1
    """Episodes per question."""
    groups_per_batch: int | None = None
    settings: Mapping[str, Any] = {}
    """The run's settings as plain JSON values, without secrets."""
    is_tinker: bool = False
    """The model runs in Tinker's cloud, whose prices apply; other services have unknown prices."""
    price: Price | None = None
    """The user's price; None to use the price table."""
    used: TokenUsage = TokenUsage()
    """Tokens used by the run's earlier sessions."""
    spent: float | None = 0.0
    """US dollars spent on ``used``; None if unknown."""


class Notice(Event, frozen=True):
    """A one-line message for the user."""

    text: str
    is_warning: bool = False


class PhaseStarted(Event, frozen=True):
    """A long phase starts: ``index``, ``evaluate``, ``warm-up``, ``train``."""

    phase: str
    total: int
    """Units of work (passages, episodes, steps)."""
    unit: str
    label: str = ""
    """Distinguishes repeated phases (``untrained``, ``after RL``)."""
    seconds_at_most: float | None = None
    """The phase ends after this long, done or not; None: no limit."""
    at_least: int = 0
    """Units that ``seconds_at_most`` does not prevent."""


class PhaseAdvanced(Event, frozen=True):
    phase: str
    done: int
    """Units finished in total."""
    metrics: Mapping[str, float] = {}


class PhaseEnded(Event, frozen=True):
    phase: str
    seconds: float


class RolloutSampled(Event, frozen=True):
    """Rollout telemetry at 4 Hz while an engine is open. Gauges unless marked as totals."""

    episodes: int
    """In flight: ``sampling``, ``queued`` for a sampling slot, ``searching``, and a few in between."""
    sampling: int
    queued: int
    searching: int
    groups: int
    """In flight."""
    finished_episodes: int
    """Total since the engine opened, evaluations included, as are the tokens."""
    prompt_tokens: int
    """Every turn's whole prompt, cached or not, and a shared first prompt once per sample."""
    sampled_tokens: int
    search: Mapping[str, float]
    """Totals since the search was created, named as in ``SearchStatistics.metrics``."""
    limited_by: str
    """What limits samples in flight: a :class:`~searchr1_async.rollout.limit.Cause`."""
    loop_lag_p50: float
    """Median lateness of the event loop's timers over the last second, in seconds."""
    loop_lag_p99: float
    loop_lag_max: float
    cpu: float
    """CPU seconds per second of this process over the last second."""
    is_paused: bool = False
    cached_prompt_tokens: int = 0
    """The part of ``prompt_tokens`` billed as cache hits."""


class PipelineChanged(Event, frozen=True):
    """State of the learning pipeline, emitted on every change."""

    step: int
    """The open batch, counted from 1."""
    policy_version: int
    """Optimizer steps behind the newest sampling weights."""
    batch_groups: int
    """Groups in the open batch when full."""
    taken_groups: int
    """Groups in it so far, dropped ones included."""
    waiting_groups: int
    """Finished groups not yet in a batch."""
    trainer: Literal["idle", "learning", "stepping"]
    """``learning``: minibatches of the open batch are at the trainer; ``stepping``: a closed batch's optimizer step is."""


class EpisodeFinished(Event, frozen=True):
    """A training episode finished; evaluations and plain rollouts report through their phase's progress."""

    episode: Episode
    step: int


class GroupFinished(Event, frozen=True):
    group: Group
    step: int


class GroupDropped(Event, frozen=True):
    """A finished group that is not trained on."""

    group: Group
    step: int
    reason: DropReason


class MinibatchSubmitted(Event, frozen=True):
    step: int
    groups: int
    datums: int
    tokens: int


class BesideSampled(Event, frozen=True):
    """Sampling outside the rollout: base-model log-probabilities for the KL penalty, or a turn of a question of
    :meth:`~searchr1_async.runs.run.Run.ask`."""

    prompt_tokens: int
    cached_prompt_tokens: int
    """The part of ``prompt_tokens`` billed as cache hits."""
    sampled_tokens: int
    """One per log-probability request."""


class MinibatchLearned(Event, frozen=True):
    """The trainer has the minibatch's gradient."""

    step: int
    datums: int
    tokens: int


class BatchClosed(Event, frozen=True):
    """A batch's last minibatch and its optimizer step are at the trainer; the next batch is open."""

    step: int
    groups: int
    """Groups in the batch, dropped ones included."""


class WeightsPublished(Event, frozen=True):
    """New episodes are sampled from the weights after this step."""

    step: int


class StepFinished(Event, frozen=True):
    """An optimizer step is done *and* its resume point is on disk."""

    step: int
    """Optimizer steps finished, this one included."""
    metrics: Mapping[str, float]


class EvaluationFinished(Event, frozen=True):
    label: str
    """``untrained``, ``after RL``, ``step 20``, …"""
    step: int | None
    """Optimizer steps behind its weights."""
    metrics: Mapping[str, float]
    """``exact_match`` with ``exact_match_low`` and ``exact_match_high`` (95 % interval), ``questions``, ``episodes``, and
    ``exact_match/<suite>`` per suite."""


class RunPaused(Event, frozen=True):
    """The run sends no new requests until it resumes."""


class RunResumed(Event, frozen=True):
    """The run continues after a pause."""


class ServiceSilent(Event, frozen=True):
    """The Tinker service does not answer: the run is paused until it does, or until the outage limit."""


class ServiceAnswers(Event, frozen=True):
    """The Tinker service answers again."""


class CheckpointSaved(Event, frozen=True):
    step: int
    path: str
    """The ``tinker://`` path of the training state."""


EndReason = Literal["finished", "time_limit", "max_cost", "stopped", "failed"]
"""Why a run ended: all its steps are done; a limit was near; somebody stopped it (Ctrl-C, a signal, ``run.stop()``); an error, which
the notice before says."""


class RunEnded(Event, frozen=True):
    reason: EndReason


Emit = Callable[[Event], None]


def emit_nothing(event: Event) -> None:
    """Discards the event."""


class Watchers:
    """An :data:`Emit` that forwards each event to its subscribers, in order.

    A subscriber that raises is dropped, with one warning and its traceback. Exceptions outside :class:`Exception` (an
    interrupt) propagate.
    """

    def __init__(self, subscribers: Iterable[Emit] = ()) -> None:
        # Replaced, never mutated: a subscriber may subscribe or unsubscribe during a call.
        self.subscribers: tuple[Emit, ...] = tuple(subscribers)

    def subscribe(self, subscriber: Emit) -> None:
        """Add ``subscriber``, from the next event on. Adding it twice has no effect."""
        if subscriber not in self.subscribers:
            self.subscribers = (*self.subscribers, subscriber)

    def unsubscribe(self, subscriber: Emit) -> None:
        """Remove ``subscriber``; no error if it is absent (it may have been dropped)."""
        self.subscribers = tuple(other for other in self.subscribers if other != subscriber)

    def close(self) -> None:
        """Remove all subscribers: late events of a finished run are discarded."""
        self.subscribers = ()

    def __call__(self, event: Event) -> None:
        for subscriber in self.subscribers:
            try:
                subscriber(event)
            except Exception:
                self.unsubscribe(subscriber)
                what = type(event).__name__
                logger.warning("watcher %r failed on %s and is not called again", subscriber, what, exc_info=True)


@dataclass(eq=False)
class _Reader:
    waiting: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_QUEUED))
    arrived: anyio.Event = field(default_factory=anyio.Event)
    lost: int = 0


class EventStreams:
    """Distributes events to any number of readers; subscribe it to the run."""

    def __init__(self) -> None:
        # Weak: an abandoned or never started loop is dropped with its iterator.
        self._readers: WeakSet[_Reader] = WeakSet()

    def __call__(self, event: Event) -> None:
        for reader in self._readers:
            reader.lost += len(reader.waiting) == MAX_QUEUED
            reader.waiting.append(event)
        self.wake()

    def wake(self) -> None:
        """Make readers re-check whether the run is over."""
        for reader in self._readers:
            reader.arrived.set()

    def events(self, is_over: Callable[[], bool]) -> AsyncGenerator[Event, None]:
        """Every event from now on, until ``is_over`` and the buffer is empty. A slow reader loses the oldest events and gets a
        notice with their number."""
        reader = _Reader()
        self._readers.add(reader)
        return _read(reader, is_over)


async def _read(reader: _Reader, is_over: Callable[[], bool]) -> AsyncGenerator[Event, None]:
    while True:
        while reader.waiting:
            if lost := reader.lost:
                reader.lost = 0
                yield Notice(f"{lost} events were dropped: the reader was too slow", is_warning=True)
            yield reader.waiting.popleft()
        if is_over():
            return
        reader.arrived = anyio.Event()
        await reader.arrived.wait()
