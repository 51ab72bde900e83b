"""A run's progress over time: its curves in bounded memory, the remaining time of a phase, and pauses.

Pure: the caller passes the time in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from searchr1_async.events import PhaseStarted, RunPaused, RunResumed, ServiceAnswers, ServiceSilent
from searchr1_async.records.metrics import CURVES

Row = dict[str, float | None]
"""``step`` and a value per curve, by the metric's name; None where the step has none."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How much of a series a reader has received."""

    generation: int = -1
    settled: int = 0


class Series:
    """One row per step; past ``limit`` rows, neighbouring rows are merged into their means, repeatedly.

    The last row may be incomplete. All earlier rows stay fixed until the next merge, so a page only needs the new ones
    (:meth:`since`).
    """

    def __init__(self, limit: int = 500) -> None:
        self._limit = max(2, limit + limit % 2)
        self._settled: list[Row] = []
        self._open: list[Row] = []
        self._stride = 1
        self._generation = 0
        self._last = -math.inf
        self.added = 0
        """Total steps added."""

    def __len__(self) -> int:
        return len(self._settled) + bool(self._open)

    @property
    def steps_per_row(self) -> int:
        return self._stride

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step; steps not after the last one are ignored."""
        if step <= self._last:
            return
        self._last = step
        self.added += 1
        self._open.append({"step": float(step)} | {curve.name: finite(metrics.get(curve.column)) for curve in CURVES})
        if len(self._open) < self._stride:
            return
        self._settled.append(mean_row(self._open))
        self._open = []
        if len(self._settled) >= self._limit:
            self._settled = [mean_row(self._settled[at : at + 2]) for at in range(0, len(self._settled), 2)]
            self._stride *= 2
            self._generation += 1

    def rows(self, first: int = 0) -> list[Row]:
        """Rows from ``first`` on, including the incomplete last one."""
        rows = self._settled[first:]
        return [*rows, mean_row(self._open)] if self._open else rows

    def since(self, mark: Mark) -> tuple[int, list[Row], Mark]:
        """What a reader at ``mark`` lacks: the first new row's index, the new rows, and the new mark."""
        first = mark.settled if mark.generation == self._generation else 0
        return first, self.rows(first), Mark(self._generation, len(self._settled))


def mean_row(rows: list[Row]) -> Row:
    """Mean of each value over the rows that have it."""
    if len(rows) == 1:
        return rows[0]
    merged: Row = {}
    for name in rows[0]:
        known = [value for row in rows if (value := row[name]) is not None]
        merged[name] = sum(known) / len(known) if known else None
    return merged


def finite(value: object) -> float | None:
    """``value`` as a float; None unless it is a finite number."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


@dataclass(slots=True)
class Estimate:
    """Remaining time of a phase, from its recent pace. Pure: the caller passes the time in."""

    total: int
    started: float
    done: int = 0
    seconds_at_most: float | None = None
    """Upper bound on the phase's duration."""
    _history: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=20))
    _paused_at: float | None = None
    _paused: float = 0.0
    """Seconds spent paused; excluded from both the pace and the limit."""

    def __post_init__(self) -> None:
        self._history.append((self.started, self.done))

    def advance(self, done: int, now: float) -> None:
        """Record that ``done`` units are finished at ``now``.

        Progress reported within the first second was done by an earlier session and does not count towards the pace.
        """
        now = self._worked(now)
        if len(self._history) == 1 and now - self.started < 1.0:
            self._history.clear()
        self.done = done
        self._history.append((now, done))

    def seconds_left(self, now: float) -> float | None:
        """None while neither the pace nor a limit is known."""
        if self.done >= self.total:
            return 0.0
        now = self._worked(now)
        by_pace = self._by_pace(now)
        if self.seconds_at_most is None:
            return by_pace
        by_limit = max(0.0, self.started + self.seconds_at_most - now)
        return by_limit if by_pace is None else min(by_pace, by_limit)

    def pause(self, now: float) -> None:
        """Pause the clock."""
        if self._paused_at is None:
            self._paused_at = now

    def resume(self, now: float) -> None:
        """Resume the clock."""
        if self._paused_at is not None:
            self._paused += now - self._paused_at
            self._paused_at = None

    def _worked(self, now: float) -> float:
        """``now`` on a clock that stops while the run is paused."""
        return (now if self._paused_at is None else self._paused_at) - self._paused

    def _by_pace(self, now: float) -> float | None:
        then, before = self._history[0]
        latest, done = self._history[-1]
        if done <= before or latest <= then:
            return None
        seconds_per_unit = (latest - then) / (done - before)
        return max(0.0, (self.total - done) * seconds_per_unit - (now - latest))


@dataclass(slots=True)
class Phase:
    """An active phase."""

    event: PhaseStarted
    estimate: Estimate
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Its latest metrics."""


@dataclass(slots=True)
class Pauses:
    """Why a run is paused: on request, because the Tinker service is not responding, or both."""

    reasons: set[str] = field(default_factory=set)

    def see(
        self, event: RunPaused | RunResumed | ServiceSilent | ServiceAnswers, estimates: Iterable[Estimate], now: float
    ) -> None:
        """Update the reasons, then pause or resume the estimates."""
        reason = "pause" if isinstance(event, RunPaused | RunResumed) else "service"
        if isinstance(event, RunPaused | ServiceSilent):
            self.reasons.add(reason)
        else:
            self.reasons.discard(reason)
        for estimate in estimates:
            self.apply(estimate, now)

    def apply(self, estimate: Estimate, now: float) -> None:
        """Pause or resume an estimate according to the current reasons."""
        (estimate.pause if self.reasons else estimate.resume)(now)
