"""The progress of a phase: its remaining time, and what counts as a pause. Pure: the caller passes the time in."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from searchr1_async.events import Event, PhaseStarted, RunPaused, RunResumed, ServiceAnswers, ServiceSilent
from searchr1_async.watch.markup import duration


@dataclass(slots=True)
class WorkClock:
    """Seconds of work: time without the pauses of a run, on request or because the Tinker service does not answer."""

    is_paused: bool = False
    """On request."""
    _is_silent: bool = False
    _stopped_at: float | None = None
    _stopped: float = 0.0
    """Seconds of earlier pauses."""

    def see(self, event: Event, now: float) -> None:
        if isinstance(event, RunPaused | RunResumed):
            self.is_paused = isinstance(event, RunPaused)
        elif isinstance(event, ServiceSilent | ServiceAnswers):
            self._is_silent = isinstance(event, ServiceSilent)
        is_stopped = self.is_paused or self._is_silent
        if is_stopped and self._stopped_at is None:
            self._stopped_at = now
        elif not is_stopped and self._stopped_at is not None:
            self._stopped += now - self._stopped_at
            self._stopped_at = None

    def time(self, now: float) -> float:
        return (now if self._stopped_at is None else self._stopped_at) - self._stopped


@dataclass(slots=True)
class Phase:
    """An active phase. All times are those of a :class:`WorkClock`."""

    event: PhaseStarted
    started: float
    done: int = 0
    before: int = 0
    """Done by an earlier session."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Its latest metrics."""
    _history: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=20))

    def __post_init__(self) -> None:
        self._history.append((self.started, self.done))

    def advance(self, done: int, now: float) -> None:
        """Record that ``done`` units are finished at ``now``.

        Progress reported within the first second was done by an earlier session and does not count towards the pace.
        """
        is_earlier = len(self._history) == 1 and now - self.started < 1.0
        self.done = done
        self._history.append((now, done))
        if is_earlier:
            self._history.popleft()  # last: a terminal's redrawing thread reads the history
            self.before = done

    def seconds_left(self, now: float) -> float | None:
        """By the recent pace, within the phase's limit; None while neither is known."""
        if self.done >= self.event.total:
            return 0.0
        known: list[float] = []
        (then, before), (latest, done) = self._history[0], self._history[-1]
        has_pace = done > before and latest > then

        def until(units: int) -> float:
            return (units - done) * (latest - then) / (done - before) - (now - latest)

        if has_pace:
            known.append(until(self.event.total))
        if self.event.seconds_at_most is not None:
            limit = self.started + self.event.seconds_at_most - now
            if has_pace:
                limit = max(limit, until(self.event.at_least))
            known.append(limit)
        return max(0.0, min(known)) if known else None

    @property
    def name(self) -> str:
        """``evaluate (untrained)``."""
        return f"{self.event.phase} ({self.event.label})" if self.event.label else self.event.phase

    @property
    def share(self) -> float:
        """Done part of the total, 0 to 1."""
        return min(1.0, max(0.0, self.done / self.event.total)) if self.event.total > 0 else 0.0

    def left(self, now: float) -> str:
        """``38 s left``; empty if unknown."""
        seconds = self.seconds_left(now)
        return "" if seconds is None else f"{duration(seconds)} left"

    def counted(self) -> str:
        """``50 of 200 questions``."""
        return f"{self.done:,} of {self.event.total:,} {self.event.unit}"
