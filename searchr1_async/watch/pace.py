"""Warns of a run that cannot end: whose first minute shows that it needs more than a day."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

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

MINUTE, DAY = 60.0, 86_400.0
MINUTES_ELSEWHERE = 3
"""Minutes in a row that must be too slow on services other than the embedded one, which play thousands of episodes at once:
in its first minutes hardly one of them may have ended."""


@dataclass
class _Phase:
    name: str
    total: int
    """Units: episodes of training, or what a measurement counts."""
    since: float
    """When the minute began that is looked at."""
    done: int = 0
    """Units, of this session."""
    before: int = 0
    """Of these, done when that minute began."""
    slow: int = 0
    """Minutes in a row that were too slow."""


class PaceWarning:
    """A watcher that says once in each phase how long it will take, where that is over a day, and what to set.

    Args:
        emit: gets the warning.
        clock: monotonic seconds.
    """

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._emit, self._clock = emit, clock
        self._run: RunStarted | None = None
        self._phase: _Phase | None = None
        self._held_by = frozenset[str]()

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
                self._phase.total -= event.done * self._episodes_a_step  # those of earlier sessions
            case EpisodeFinished() if self._phase is not None and self._phase.name == "train":
                self._phase.done += 1
            case RunPaused() | ServiceSilent():
                self._held_by |= {_holder(event)}
            case RunResumed() | ServiceAnswers():
                self._held_by -= {_holder(event)}
                self._begin_minute(now)
        if not self._held_by:
            self._look(now)

    def _begin_minute(self, now: float) -> None:
        if self._phase is not None:
            self._phase.since, self._phase.before = now, self._phase.done

    @property
    def _episodes_a_step(self) -> int:
        run = self._run
        return 0 if run is None else (run.group_size or 0) * (run.groups_per_batch or 0)

    def _start(self, event: PhaseStarted, now: float) -> None:
        if event.seconds_at_most is not None or (self._phase is not None and self._phase.name == "train"):
            return  # it is bounded, or is a measurement that waits for the training
        if event.phase == "train" and self._episodes_a_step:
            self._phase = _Phase("train", event.total * self._episodes_a_step, now)
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
            self._emit(Notice(_words(phase, seconds, rate), is_warning=True))


def _holder(event: RunPaused | RunResumed | ServiceSilent | ServiceAnswers) -> str:
    return "pause" if isinstance(event, RunPaused | RunResumed) else "service"


def _words(phase: _Phase, seconds: float, rate: float) -> str:
    days = f"about {seconds / DAY:,.0f} days" if seconds > 10 * DAY else f"about {seconds / DAY:.1f} days"
    pace = f"at {rate * MINUTE:,.0f} a minute"
    if phase.name == "train":
        return (
            f"this run needs {days}: {phase.total:,} episodes, {pace}. Set fewer steps= or a time_limit=, or less of "
            "groups_per_batch=, group_size=, max_turns= and max_tokens="
        )
    return (
        f"this {'measurement' if phase.name == 'evaluate' else 'rollout'} needs {days}: {phase.total:,} to play, {pace}. Give fewer questions (limit=, held_out=), fewer "
        "samples, or less of max_turns= and max_tokens="
    )
