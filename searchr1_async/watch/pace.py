"""An early warning for a run that needs more than a day."""

from __future__ import annotations

import time
from collections.abc import Callable

from searchr1_async.events import Emit, Event, Notice
from searchr1_async.watch.state import RunState

MINUTE, DAY = 60.0, 86_400.0
MINUTES_ELSEWHERE = 3
"""Before a warning on services other than the embedded one, which run thousands of episodes at once: hardly any may have finished in
the first minutes."""
_ADVICE = {
    "train": "Lower steps=, groups_per_batch=, group_size=, max_turns= or max_tokens=, or set a time_limit=",
    "evaluate": "Use fewer questions (limit=, held_out=) or samples, or lower max_turns= or max_tokens=",
}
_ADVICE["rollout"] = _ADVICE["evaluate"]


class PaceWarning:
    """Subscriber that warns once per phase if the phase will take over a day, and names the settings to lower.

    Args:
        emit: receives the warning.
        clock: monotonic seconds.
    """

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._emit, self._clock = emit, clock
        self._state = RunState()
        self._checked: set[str] = set()

    def __call__(self, event: Event) -> None:
        if "train" in self._checked:  # what comes later is short, or has been measured
            return
        now, state = self._clock(), self._state
        state.see(event, now)
        phase = state.main_phase
        if phase is None or phase.event.phase not in _ADVICE.keys() - self._checked:
            return
        seconds = state.work.time(now) - phase.started
        if seconds < (MINUTE if state.run.is_embedded else MINUTES_ELSEWHERE * MINUTE):
            return
        kind = phase.event.phase
        self._checked.add(kind)
        total, done = phase.event.total - phase.before, phase.done - phase.before
        if kind == "train":
            total, done = total * state.run.group_size * (state.run.groups_per_batch or 0), state.training_episodes
        rate = max(1, done) / seconds
        days = (total - done) / rate / DAY
        if days > 1 and phase.event.seconds_at_most is None:
            pace = f"{total:,} episodes, at {rate * MINUTE:,.0f} per minute"
            work = {"train": "run", "evaluate": "evaluation"}.get(kind, kind)
            self._emit(Notice(f"this {work} needs about {days:,.1f} days: {pace}. {_ADVICE[kind]}", is_warning=True))
