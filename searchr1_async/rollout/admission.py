"""Who may start, and which finished groups make up a batch: bounded staleness as a pure state machine.

A group that starts under weights of version v must be trained on in step v + 1 + k at the latest (its *last step*; k is
``max_staleness``). Steps take groups as they finish, ``groups_per_batch`` each. Two rules keep every last step, so that no
finished work is thrown away:

- **start**: a group starts only if all groups that are started and not trained on yet fit, with it, into the steps up to its
  own last step;
- **take**: a finished group goes into the open step only if those that must be trained on earlier than it still fit into
  the steps up to theirs.

With k = 0 this is the plain on-policy loop: a batch starts, all of it must be in its step, and nothing starts until the next
weights are there. With k = 1 a second batch may be under way, and the slowest of a batch have one step more.

Nothing here knows of time, tasks or services. Callers tell what happened, then ask :meth:`Admission.next_start`,
:meth:`Admission.take` and :meth:`Admission.is_full`.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from searchr1_async.config import PipelineSettings


@dataclass(frozen=True, slots=True)
class Closed:
    """What became of a step's batch."""

    step: int
    taken: tuple[int, ...]
    """Places of the groups in it, in the order in which they were taken; dropped ones too."""
    replaced: tuple[int, ...]
    """Places of groups of constant reward that others were played for."""
    cancelled: tuple[int, ...]
    """Places of groups that were too slow: the caller cancels them."""

    @property
    def places(self) -> tuple[int, ...]:
        """All of them."""
        return (*self.taken, *self.replaced, *self.cancelled)


class Admission:
    """The state of one run's groups.

    Args:
        settings: staleness, spare groups and the budget of refills.
        groups_per_batch: groups a step.
        next_place: the first place that was never started.
        end: places in all epochs; None where only ``steps`` ends the run.
        steps: optimiser steps in all; None where only ``end`` does.
        step: steps finished before.
    """

    def __init__(
        self,
        settings: PipelineSettings,
        groups_per_batch: int,
        *,
        next_place: int = 0,
        end: int | None = None,
        steps: int | None = None,
        step: int = 0,
    ) -> None:
        self._settings = settings
        self._size = groups_per_batch
        self._next = next_place
        self._end = end
        self._steps = steps
        self._closed = step
        self._version = step
        self._again: list[int] = []
        self._running: dict[int, int] = {}
        # By version, in the order in which they finished: of hundreds of groups each event looks at a few versions only.
        self._ready: defaultdict[int, deque[int]] = defaultdict(deque)
        self._runners: Counter[int] = Counter()
        self._taken: list[int] = []
        self._replaced: list[int] = []

    # --- what happened ------------------------------------------------------------------------------------------------

    def restore(self, finished: Mapping[int, int], lost: Iterable[int], *, constant: Collection[int] = ()) -> None:
        """An earlier session's groups.

        Args:
            finished: the version that each began under, by place.
            lost: those to play again.
            constant: those of ``finished`` with constant reward.
        """
        for place, version in finished.items():
            if place in constant and len(self._replaced) < self._settings.refill_groups:
                self._replaced.append(place)
            else:
                self._ready[version].append(place)
        self._again.extend(sorted(lost))
        self._next = max([self._next, *(place + 1 for place in (*finished, *self._again))])

    def started(self, place: int) -> None:
        """The group that :meth:`next_start` named has begun, under the newest weights."""
        if self._again and self._again[0] == place:
            self._again.pop(0)
        else:
            assert place == self._next, f"place {place} was not next"
            self._next += 1
        self._running[place] = self._version
        self._runners[self._version] += 1

    def finished(self, place: int, *, is_constant: bool = False) -> bool:
        """A group has ended, with enough members or not; whether it is to be replaced by another (dynamic sampling)."""
        version = self._end_of(place)
        if is_constant and len(self._replaced) < self._settings.refill_groups:
            self._replaced.append(place)
            return True
        self._ready[version].append(place)
        return False

    def published(self, version: int) -> None:
        """New weights are there: groups start under them from now on."""
        self._version = max(self._version, version)

    # --- what to do ---------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The open step, from 1."""
        return self._closed + 1

    @property
    def version(self) -> int:
        """Of the newest weights."""
        return self._version

    @property
    def next_place(self) -> int:
        """The first place that was never started."""
        return self._next

    @property
    def open_places(self) -> tuple[int, ...]:
        """Places started (now, or by an earlier session) and in no closed step."""
        ready = itertools.chain.from_iterable(self._ready.values())
        return tuple(sorted({*self._again, *self._running, *ready, *self._taken, *self._replaced}))

    @property
    def running(self) -> tuple[int, ...]:
        return tuple(self._running)

    @property
    def taken(self) -> int:
        """Groups that the open step has."""
        return len(self._taken)

    @property
    def waiting(self) -> int:
        """Finished groups that no step has taken yet."""
        return sum(map(len, self._ready.values()))

    @property
    def is_over(self) -> bool:
        """No step is left to be opened."""
        if self._steps is not None and self._closed >= self._steps:
            return True
        return not (self._taken or self._replaced or self._running or self.waiting or self._left)

    @property
    def _left(self) -> bool:
        """There are groups that could be started, now or later."""
        return bool(self._again) or self._end is None or self._next < self._end

    def next_start(self) -> int | None:
        """The place of the group that may start now; None while none may."""
        if not self._left:
            return None
        last_step = self._last_step(self._version)
        if last_step <= self._closed:
            return None  # it waits for the next weights
        under_way = len(self._taken) + len(self._running) + self.waiting
        if under_way >= (last_step - self._closed) * self._size + self._settings.spare_groups:
            return None
        return self._again[0] if self._again else self._next

    def take(self) -> list[int]:
        """Moves what belongs into the open step, oldest weights first; returns those places."""
        taken = []
        for version in sorted(self._ready):
            while self._ready[version] and self._belongs(version):
                taken.append(self._ready[version].popleft())
                self._taken.append(taken[-1])
            if not self._ready[version]:
                del self._ready[version]
        return taken

    @property
    def is_full(self) -> bool:
        """The open step waits for nothing more."""
        if self.is_due:
            return False
        if len(self._taken) >= self._size:
            slow = sum(count for version, count in self._runners.items() if self._last_step(version) <= self.step)
            return slow <= self._settings.spare_groups
        if self._running or self.waiting or self.next_start() is not None:
            return False
        # All places are played. What was replaced in vain is a batch too: it must be written down.
        return not self._left and bool(self._taken or self._replaced)

    @property
    def is_due(self) -> bool:
        """A finished group has to go into the open step: :meth:`take` it before the step is closed."""
        return any(group and self._last_step(version) <= self.step for version, group in self._ready.items())

    @property
    def lacking(self) -> int:
        """Groups that the open step needs besides the finished ones."""
        return max(0, self._size - len(self._taken) - self.waiting)

    def must_come(self) -> tuple[int, ...]:
        """Places of running groups that the open step has to take."""
        return tuple(place for place, version in self._running.items() if self._last_step(version) <= self.step)

    def close(self) -> Closed:
        """Ends the open step's batch; the next one is open then."""
        cancelled = self.must_come()
        for place in cancelled:
            self._end_of(place)
        closed = Closed(self.step, tuple(self._taken), tuple(self._replaced), cancelled)
        self._taken, self._replaced = [], []
        self._closed += 1
        return closed

    # --- the rules ----------------------------------------------------------------------------------------------------

    def _last_step(self, version: int) -> int:
        last = version + 1 + self._settings.max_staleness
        return last if self._steps is None else min(last, self._steps)

    def _end_of(self, place: int) -> int:
        """Takes a group from the running ones; the version that it began under."""
        version = self._running.pop(place)
        self._runners[version] -= 1
        if not self._runners[version]:
            del self._runners[version]
        return version

    def _belongs(self, version: int) -> bool:
        """Whether a finished group that began under this version goes into the open step."""
        last_step = self._last_step(version)
        if last_step <= self.step:
            return True
        if len(self._taken) >= self._size:
            return False
        # Those that must be trained on before it have to fit, with it, into the steps up to their own last ones.
        due: Counter[int] = Counter()
        for other in {*self._runners, *self._ready}:
            due[max(self.step, self._last_step(other))] += self._runners[other] + len(self._ready.get(other, ()))
        earlier = 0
        for step in range(self.step, last_step):
            earlier += due[step]
            room = (step - self._closed) * self._size + self._settings.spare_groups
            if len(self._taken) + 1 + earlier > room:
                return False
        return True
