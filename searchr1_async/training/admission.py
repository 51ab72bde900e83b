"""Bounded staleness as a pure state machine: which groups may start, and which finished groups form a batch.

A group started under weights version v must be trained on by step v + 1 + k (its *last step*; k is ``max_staleness``). Steps
take groups as they finish, ``groups_per_batch`` each. Two rules enforce every last step without discarding finished work:

- **start**: a group starts only if it and all untrained groups fit into the steps up to its own last step;
- **take**: a finished group joins the open step only if the groups with earlier last steps still fit.

k = 0 is the on-policy loop: a batch starts, is trained on as a whole, and nothing starts until the next weights arrive. With
k = 1 a second batch may be in progress, and slow groups get one more step.

Callers report events, then ask :meth:`Admission.next_start`, :meth:`Admission.take` and :meth:`Admission.is_full`.

Order of the questions: one stream of places over all epochs, each epoch shuffled with the seed.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from searchr1_async.config import PipelineSettings
from searchr1_async.episodes.types import Question
from searchr1_async.errors import QuestionsError


@dataclass(frozen=True, slots=True)
class Closed:
    """Outcome of a step's batch."""

    step: int
    taken: tuple[int, ...]
    """Places of its groups in the order taken, including dropped ones."""
    replaced: tuple[int, ...]
    """Places of constant-reward groups that were replaced."""
    cancelled: tuple[int, ...]
    """Places of groups that were too slow; the caller cancels them."""

    @property
    def places(self) -> tuple[int, ...]:
        return (*self.taken, *self.replaced, *self.cancelled)


class Admission:
    """State of a run's groups.

    Args:
        settings: staleness, spare groups and refill budget.
        groups_per_batch: groups per step.
        next_place: first place never started.
        end: number of places in all epochs; None if only ``steps`` ends the run.
        steps: total optimizer steps; None if only ``end`` ends the run.
        step: steps already finished.
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
        # By version, in order of completion, so that each event looks at a few versions instead of hundreds of groups.
        self._ready: defaultdict[int, deque[int]] = defaultdict(deque)
        self._runners: Counter[int] = Counter()
        self._taken: list[int] = []
        self._replaced: list[int] = []

    # --- events ---------------------------------------------------------------------------------------------------------

    def restore(self, finished: Mapping[int, int], lost: Iterable[int], *, constant: Collection[int] = ()) -> None:
        """Restores the groups of an earlier session.

        Args:
            finished: start version by place.
            lost: places to roll out again.
            constant: places in ``finished`` with constant reward.
        """
        for place, version in finished.items():
            if place in constant and len(self._replaced) < self._settings.refill_groups:
                self._replaced.append(place)
            else:
                self._ready[version].append(place)
        self._again.extend(sorted(lost))
        self._next = max([self._next, *(place + 1 for place in (*finished, *self._again))])

    def started(self, place: int) -> None:
        """Records the start of the group named by :meth:`next_start`, under the newest weights."""
        if self._again and self._again[0] == place:
            self._again.pop(0)
        else:
            assert place == self._next, f"place {place} was not next"
            self._next += 1
        self._running[place] = self._version
        self._runners[self._version] += 1

    def finished(self, place: int, *, is_constant: bool = False) -> bool:
        """Records the end of a group; returns whether it must be replaced (dynamic sampling)."""
        version = self._end_of(place)
        if is_constant and len(self._replaced) < self._settings.refill_groups:
            self._replaced.append(place)
            return True
        self._ready[version].append(place)
        return False

    def published(self, version: int) -> None:
        """Records new weights; groups start under them from now on."""
        self._version = max(self._version, version)

    # --- decisions ------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The open step, from 1."""
        return self._closed + 1

    @property
    def version(self) -> int:
        """Version of the newest weights."""
        return self._version

    @property
    def next_place(self) -> int:
        """The first place never started."""
        return self._next

    @property
    def open_places(self) -> tuple[int, ...]:
        """Places started in any session and not part of a closed step."""
        ready = itertools.chain.from_iterable(self._ready.values())
        return tuple(sorted({*self._again, *self._running, *ready, *self._taken, *self._replaced}))

    @property
    def running(self) -> tuple[int, ...]:
        return tuple(self._running)

    @property
    def taken(self) -> int:
        """Groups in the open step."""
        return len(self._taken)

    @property
    def waiting(self) -> int:
        """Finished groups not yet in a step."""
        return sum(map(len, self._ready.values()))

    @property
    def is_over(self) -> bool:
        """No step remains."""
        if self._steps is not None and self._closed >= self._steps:
            return True
        return not (self._taken or self._replaced or self._running or self.waiting or self._left)

    @property
    def _left(self) -> bool:
        """Some group can still be started, now or later."""
        return bool(self._again) or self._end is None or self._next < self._end

    def next_start(self) -> int | None:
        """Place of the group that may start now, or None."""
        if not self._left:
            return None
        last_step = self._last_step(self._version)
        if last_step <= self._closed:
            return None  # waits for the next weights
        under_way = len(self._taken) + len(self._running) + self.waiting
        if under_way >= (last_step - self._closed) * self._size + self._settings.spare_groups:
            return None
        return self._again[0] if self._again else self._next

    def take(self) -> list[int]:
        """Moves eligible groups into the open step, oldest weights first; returns their places."""
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
        """The open step is complete."""
        if self.is_due:
            return False
        if len(self._taken) >= self._size:
            slow = sum(count for version, count in self._runners.items() if self._last_step(version) <= self.step)
            return slow <= self._settings.spare_groups
        if self._running or self.waiting or self.next_start() is not None:
            return False
        # All places are done. A batch of replaced groups only must still be recorded.
        return not self._left and bool(self._taken or self._replaced)

    @property
    def is_due(self) -> bool:
        """A finished group must join the open step: call :meth:`take` before closing it."""
        return any(group and self._last_step(version) <= self.step for version, group in self._ready.items())

    @property
    def lacking(self) -> int:
        """Groups that the open step still needs besides the finished ones."""
        return max(0, self._size - len(self._taken) - self.waiting)

    def must_come(self) -> tuple[int, ...]:
        """Places of running groups that must join the open step."""
        return tuple(place for place, version in self._running.items() if self._last_step(version) <= self.step)

    def close(self) -> Closed:
        """Closes the open step and opens the next."""
        cancelled = self.must_come()
        for place in cancelled:
            self._end_of(place)
        closed = Closed(self.step, tuple(self._taken), tuple(self._replaced), cancelled)
        self._taken, self._replaced = [], []
        self._closed += 1
        return closed

    # --- rules ----------------------------------------------------------------------------------------------------------

    def _last_step(self, version: int) -> int:
        last = version + 1 + self._settings.max_staleness
        return last if self._steps is None else min(last, self._steps)

    def _end_of(self, place: int) -> int:
        """Removes a running group; returns its start version."""
        version = self._running.pop(place)
        self._runners[version] -= 1
        if not self._runners[version]:
            del self._runners[version]
        return version

    def _belongs(self, version: int) -> bool:
        """Whether a finished group of this version joins the open step."""
        last_step = self._last_step(version)
        if last_step <= self.step:
            return True
        if len(self._taken) >= self._size:
            return False
        # Groups with earlier last steps must still fit beside it.
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


class QuestionOrder:
    """Maps places (0, 1, 2, … over the whole run) to questions.

    A resume point and a sampling seed depend on a question only through its place.

    Raises:
        QuestionsError: there are no questions, or two share an id.
    """

    def __init__(self, questions: Sequence[Question], *, seed: int) -> None:
        if not questions:
            raise QuestionsError("there are no questions to train on")
        seen: set[str] = set()
        for question in questions:
            if question.id in seen:
                raise QuestionsError(f"two questions have the id {question.id!r}: ids must be unique")
            seen.add(question.id)
        self._questions = tuple(questions)
        self._seed = seed
        # Two, since groups of one epoch may still be running when the next begins.
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        """Questions per epoch."""
        return len(self._questions)

    @property
    def fingerprint(self) -> str:
        """Changes with any question's id or position and with the seed: a resume point is valid for one order only."""
        digest = hashlib.sha256(str(self._seed).encode())
        for question in self._questions:
            digest.update(b"\0" + question.id.encode("utf-8", "replace"))
        return digest.hexdigest()[:16]

    def question(self, place: int) -> Question:
        epoch, offset = divmod(place, len(self._questions))
        return self._shuffled(epoch)[offset]

    def _shuffle(self, epoch: int) -> tuple[Question, ...]:
        questions = list(self._questions)
        random.Random(f"{self._seed}/{epoch}").shuffle(questions)
        return tuple(questions)
