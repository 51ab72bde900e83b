"""Subscribers to a run's events: one emitter that isolates their failures (:class:`Watchers`), iterators over the events
(:class:`EventStreams`), and an early warning for a run that needs more than a day (:class:`PaceWarning`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from weakref import WeakSet

import anyio

from searchr1_async.events import (
    Emit,
    EpisodeFinished,
    Event,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    RunPaused,
    RunResumed,
    RunStarted,
    ServiceAnswers,
    ServiceSilent,
)
from searchr1_async.watch.progress import Pauses

logger = logging.getLogger(__name__)

MAX_QUEUED = 4096
"""Maximum events buffered per reader: some hold an episode of 50 KB or more."""
MINUTE, DAY = 60.0, 86_400.0
MINUTES_ELSEWHERE = 3
"""Consecutive slow minutes required on services other than the embedded one, which run thousands of episodes at once: hardly
any may have finished in the first minutes."""


class Watchers:
    """An :data:`~searchr1_async.events.Emit` that forwards each event to its subscribers, in order.

    A subscriber that raises is dropped, with one warning and its traceback. Exceptions outside :class:`Exception` (an
    interrupt) propagate.
    """

    def __init__(self, subscribers: Iterable[Emit] = ()) -> None:
        self._subscribers: tuple[Emit, ...] = tuple(subscribers)

    @property
    def subscribers(self) -> tuple[Emit, ...]:
        return self._subscribers

    def subscribe(self, subscriber: Emit) -> None:
        """Add ``subscriber``, from the next event on. Adding it twice has no effect."""
        if subscriber not in self._subscribers:
            self._subscribers = (*self._subscribers, subscriber)

    def unsubscribe(self, subscriber: Emit) -> None:
        """Remove ``subscriber``; no error if it is absent (it may have been dropped)."""
        self._subscribers = tuple(other for other in self._subscribers if other != subscriber)

    def close(self) -> None:
        """Remove all subscribers: late events of a finished run are discarded."""
        self._subscribers = ()

    def __call__(self, event: Event) -> None:
        # The tuple is replaced, never mutated: a subscriber may subscribe or unsubscribe during the call.
        for subscriber in self._subscribers:
            try:
                subscriber(event)
            except Exception:
                self.unsubscribe(subscriber)
                logger.warning(
                    "watcher %r failed on %s and is not called again; the run continues",
                    subscriber,
                    type(event).__name__,
                    exc_info=True,
                )


class EventStreams:
    """Distributes events to any number of readers; subscribe it to the run."""

    def __init__(self) -> None:
        # Weak: an abandoned or never started loop is dropped with its iterator.
        self._readers: WeakSet[_Reader] = WeakSet()

    @property
    def readers(self) -> int:
        """Number of active readers."""
        return len(self._readers)

    def __call__(self, event: Event) -> None:
        for reader in self._readers:
            reader.put(event)

    def wake(self) -> None:
        """Make readers re-check whether the run is over."""
        for reader in self._readers:
            reader.arrived.set()

    def events(self, is_over: Callable[[], bool]) -> AsyncGenerator[Event, None]:
        """Every event from now on, until ``is_over`` and the buffer is empty. A slow reader loses the oldest events and gets a
        notice with their number."""
        reader = _Reader()
        self._readers.add(reader)
        return self._read(reader, is_over)

    async def _read(self, reader: _Reader, is_over: Callable[[], bool]) -> AsyncGenerator[Event, None]:
        try:
            while True:
                for event in reader.take():
                    yield event
                if not reader.waiting:
                    if is_over():
                        return
                    await reader.arrived.wait()
        finally:
            self._readers.discard(reader)


class _Reader:
    def __init__(self) -> None:
        self.waiting: deque[Event] = deque(maxlen=MAX_QUEUED)
        self.arrived = anyio.Event()
        self._lost = 0

    def put(self, event: Event) -> None:
        self._lost += len(self.waiting) == MAX_QUEUED
        self.waiting.append(event)
        self.arrived.set()

    def take(self) -> list[Event]:
        self.arrived = anyio.Event()
        taken, lost = list(self.waiting), self._lost
        self.waiting.clear()
        self._lost = 0
        if lost:
            taken.insert(0, Notice(f"{lost} events were dropped: the reader was too slow", is_warning=True))
        return taken


@dataclass
class _Phase:
    name: str
    total: int
    """Units: episodes in training, else what the phase counts."""
    since: float
    """Start of the current one-minute window."""
    done: int = 0
    """Units finished in this session."""
    before: int = 0
    """``done`` at the start of the window."""
    slow: int = 0
    """Consecutive slow windows."""


class PaceWarning:
    """Subscriber that warns once per phase if the phase will take over a day, and names the settings to lower.

    Args:
        emit: receives the warning.
        clock: monotonic seconds.
    """

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._emit, self._clock = emit, clock
        self._run: RunStarted | None = None
        self._phase: _Phase | None = None
        self._pauses = Pauses()

    def __call__(self, event: Event) -> None:
        now = self._clock()
        match event:
            case RunStarted():
                self._run = event
            case PhaseStarted():
                self._start(event, now)
            case PhaseEnded() if self._phase is not None and event.phase == self._phase.name:
                self._phase = None
            case PhaseAdvanced() if self._phase is not None and event.phase == self._phase.name != "train":
                self._phase.done = event.done
            case PhaseAdvanced(phase="train") if self._phase is not None and not self._phase.done:
                self._phase.total -= event.done * self._episodes_per_step  # done by earlier sessions
            case EpisodeFinished() if self._phase is not None and self._phase.name == "train":
                self._phase.done += 1
            case RunPaused() | ServiceSilent() | RunResumed() | ServiceAnswers():
                self._pauses.see(event, (), now)
                self._begin_minute(now)
        if not self._pauses.reasons:
            self._look(now)

    def _begin_minute(self, now: float) -> None:
        if self._phase is not None:
            self._phase.since, self._phase.before = now, self._phase.done

    @property
    def _episodes_per_step(self) -> int:
        run = self._run
        return 0 if run is None else (run.group_size or 0) * (run.groups_per_batch or 0)

    def _start(self, event: PhaseStarted, now: float) -> None:
        if event.seconds_at_most is not None or (self._phase is not None and self._phase.name == "train"):
            return  # time-limited, or an evaluation during training
        if event.phase == "train" and self._episodes_per_step:
            self._phase = _Phase("train", event.total * self._episodes_per_step, now)
        elif event.phase in ("evaluate", "rollout"):
            self._phase = _Phase(event.phase, event.total, now)

    def _look(self, now: float) -> None:
        phase = self._phase
        if phase is None or now - phase.since < MINUTE:
            return
        rate = max(1, phase.done - phase.before) / (now - phase.since)
        seconds = (phase.total - phase.done) / rate
        phase.slow = phase.slow + 1 if seconds > DAY else 0
        self._begin_minute(now)
        wanted = 1 if self._run is None or self._run.is_embedded else MINUTES_ELSEWHERE
        if phase.slow == 0:
            self._phase = None
        elif phase.slow >= wanted:
            self._phase = None
            self._emit(Notice(_message(phase, seconds, rate), is_warning=True))


def _message(phase: _Phase, seconds: float, rate: float) -> str:
    days = f"about {seconds / DAY:,.0f} days" if seconds > 10 * DAY else f"about {seconds / DAY:.1f} days"
    pace = f"at {rate * MINUTE:,.0f} per minute"
    if phase.name == "train":
        return (
            f"this run needs {days}: {phase.total:,} episodes, {pace}. Lower steps=, groups_per_batch=, group_size=, max_turns= "
            "or max_tokens=, or set a time_limit="
        )
    return (
        f"this {'evaluation' if phase.name == 'evaluate' else 'rollout'} needs {days}: {phase.total:,} episodes, {pace}. Use "
        "fewer questions (limit=, held_out=) or samples, or lower max_turns= or max_tokens="
    )
