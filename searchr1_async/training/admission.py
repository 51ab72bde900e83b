"""Which group starts next, and which finished groups form a step's batch: bounded staleness as a pure state machine.

A group started under weights version v must be trained on by step v + 1 + k (its *last step*; k is ``max_staleness``). Steps
take groups as they finish, ``groups_per_batch`` each. Two rules enforce every last step without discarding finished work:

- **start**: a group starts only if it and all untrained groups fit into the steps up to its own last step;
- **take**: a finished group joins the open step only if the groups with earlier last steps still fit.

k = 0 is the on-policy loop: a batch starts, is trained on as a whole, and nothing starts until the next weights arrive. With
k = 1 a second batch may be in progress, and slow groups get one more step.

:class:`QuestionOrder` numbers the questions: one stream of places over all epochs. :class:`Admission` is the only owner of a
group's state, by place: lost with an earlier session, running, finished, replaced or taken, in a closed step, recorded.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from searchr1_async.config import PipelineSettings, RunLearning
from searchr1_async.episodes.table import GroupOutcome
from searchr1_async.episodes.types import Group, Question
from searchr1_async.errors import QuestionsError

TOO_FEW, CONSTANT_REWARD = "too_few_episodes", "constant_reward"
TOO_SLOW, STEP_TIME_LIMIT = "too_slow", "step_time_limit"
"""Why a group is dropped: its step closed without it, or its step's time was over."""


def drop_reason(group: Group, *, drop_constant_groups: bool, min_members: int = 2) -> str | None:
    """Why a finished group is not trained on; None if it is.

    Args:
        min_members: required complete episodes.
    """
    if len(group.episodes) < min_members:
        return TOO_FEW
    return CONSTANT_REWARD if drop_constant_groups and group.is_constant else None


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
    """State of a run's groups. Report events, then ask :meth:`next_start`, :meth:`take` and :meth:`is_full`.

    Args:
        pipeline: staleness, spare groups, refill budget, smallest group.
        learning: groups per step, length of the run, whether constant rewards are dropped.
        questions: questions per epoch.
        next_place: first place never started.
        step: steps already finished.
    """

    def __init__(
        self,
        pipeline: PipelineSettings,
        learning: RunLearning,
        questions: int,
        *,
        next_place: int = 0,
        step: int = 0,
    ) -> None:
        self._pipeline, self._learning = pipeline, learning
        self._size = learning.groups_per_batch
        self._end = None if learning.steps is not None else learning.epochs * questions
        self._next = next_place
        self._closed = self._version = step
        self._lost: list[int] = []
        self._running: dict[int, int] = {}
        # By version, in order of completion, so that each event looks at a few versions instead of hundreds of groups.
        self._ready: defaultdict[int, deque[int]] = defaultdict(deque)
        self._runners: Counter[int] = Counter()
        self._taken: list[int] = []
        self._replaced: list[int] = []
        self._unrecorded: dict[int, Closed] = {}
        self._cut: set[int] = set()
        self._cut_step: int | None = None
        self._outcomes: dict[int, GroupOutcome] = {}
        self._began: dict[int, float] = {}
        """Of every group that runs or is not recorded yet: when it began, in seconds of the caller's clock."""

    # --- events ---------------------------------------------------------------------------------------------------------

    def restore(self, kept: Mapping[int, Group], open_places: Collection[int] = (), *, now: float = 0.0) -> set[int]:
        """Restores an earlier session's groups. All others that it started are rolled out again.

        Args:
            kept: its finished groups, by place.
            open_places: places of the resume point that were started and are in no recorded step.

        Returns:
            Places of the kept groups that are of use: those in no recorded step, sampled from weights that still exist.
        """
        end = max([self._next, *(place + 1 for place in kept)])
        lost = {*open_places, *range(self._next, end)}
        found: set[int] = set()
        for place, group in kept.items():
            versions = group.policy_versions or (self._closed,)
            # Turns of weights that were published but not saved belong to a future that is lost.
            if place in lost and versions[-1] <= self._closed:
                # A group that is not whole was cut by its step's time limit; one that was too slow is not kept.
                is_cut = len(group.episodes) + len(group.failed) < self._learning.group_size
                self._began[place] = now
                self._join(place, group, versions[0], is_cut=is_cut)
                found.add(place)
        self._lost, self._next = sorted(lost - found), end
        return found

    def started(self, place: int, now: float = 0.0) -> None:
        """Records the start of the group named by :meth:`next_start`, under the newest weights."""
        if self._lost and self._lost[0] == place:
            self._lost.pop(0)
        else:
            assert place == self._next, f"place {place} was not next"
            self._next += 1
        self._running[place], self._began[place] = self._version, now
        self._runners[self._version] += 1

    def finished(self, place: int, group: Group) -> GroupOutcome | None:
        """Records the end of a group; None if its step was closed without it."""
        if place not in self._running:
            return None
        is_cut = place in self._cut
        return self._join(place, group, self._end_of(place), is_cut=is_cut)

    def published(self, version: int) -> None:
        """Records new weights; groups start under them from now on."""
        self._version = max(self._version, version)

    def cut_open_step(self) -> tuple[int, ...]:
        """The open step's time is over: it starts no group, and is full once those returned have ended.

        With staleness no group may be due yet: those that began first are cut, as many as the batch lacks.
        """
        must = self.must_come()
        lacking = max(0, self._size - len(self._taken) - self.waiting)
        others = [place for place in self._running if place not in must]
        cut = (*must, *others[: max(0, lacking - len(must))])
        self._cut_step = self.step
        self._cut.update(cut)
        return cut

    def close(self, slow: Mapping[int, Group]) -> Closed:
        """Closes the open step and opens the next.

        Args:
            slow: what the groups of :meth:`must_come` have finished so far; the step drops them.
        """
        closed = Closed(self.step, tuple(self._taken), tuple(self._replaced), self.must_come())
        for place in closed.cancelled:
            self._end_of(place)
            self._outcomes[place] = GroupOutcome(place, slow[place], TOO_SLOW)
        self._taken, self._replaced = [], []
        self._unrecorded[closed.step] = closed
        self._closed += 1
        return closed

    def recorded(self, step: int) -> list[GroupOutcome]:
        """A closed step is on disk: returns its groups, which are no longer known here."""
        places = self._unrecorded.pop(step).places
        for place in places:
            del self._began[place]
        return [self._outcomes.pop(place) for place in places]

    # --- decisions ------------------------------------------------------------------------------------------------------

    def next_start(self) -> int | None:
        """Place of the group that may start now, or None."""
        if not self._has_more or self._cut_step == self.step:
            return None
        last_step = self._last_step(self._version)
        if last_step <= self._closed:
            return None  # waits for the next weights
        under_way = len(self._taken) + len(self._running) + self.waiting
        if under_way >= (last_step - self._closed) * self._size + self._pipeline.spare_groups:
            return None
        return self._lost[0] if self._lost else self._next

    def take(self) -> list[GroupOutcome]:
        """Moves eligible groups into the open step, oldest weights first; returns them."""
        taken = []
        for version in sorted(self._ready):
            while self._ready[version] and self._belongs(version):
                taken.append(self._ready[version].popleft())
                self._taken.append(taken[-1])
            if not self._ready[version]:
                del self._ready[version]
        return [self._outcomes[place] for place in taken]

    @property
    def is_full(self) -> bool:
        """The open step is complete."""
        if self._is_due:
            return False
        if self._cut_step == self.step and self._cut.isdisjoint(self._running):
            return True
        if len(self._taken) >= self._size:
            slow = sum(count for version, count in self._runners.items() if self._last_step(version) <= self.step)
            return slow <= self._pipeline.spare_groups
        if self._running or self.waiting or self.next_start() is not None:
            return False
        # All places are done. A batch of replaced groups only must still be recorded.
        return not self._has_more and bool(self._taken or self._replaced)

    @property
    def is_over(self) -> bool:
        """No step remains."""
        if self._learning.steps is not None and self._closed >= self._learning.steps:
            return True
        return not (self._taken or self._replaced or self._running or self.waiting or self._has_more)

    def must_come(self) -> tuple[int, ...]:
        """Places of running groups that must join the open step."""
        return tuple(place for place, version in self._running.items() if self._last_step(version) <= self.step)

    # --- what is known --------------------------------------------------------------------------------------------------

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
    def open_places(self) -> tuple[int, ...]:
        """Places started in any session and not part of a closed step."""
        ready = itertools.chain.from_iterable(self._ready.values())
        return tuple(sorted({*self._lost, *self._running, *ready, *self._taken, *self._replaced}))

    def open_after(self, step: int) -> tuple[int, ...]:
        """Places started in any session and not part of a step up to this one, which is the last to be recorded."""
        later = [closed.places for number, closed in self._unrecorded.items() if number > step]
        return tuple(sorted({*self.open_places, *itertools.chain.from_iterable(later)}))

    def outcomes(self, closed: Closed) -> tuple[GroupOutcome, ...]:
        """All groups of a closed step that is not recorded yet."""
        return tuple(self._outcomes[place] for place in closed.places)

    def started_before(self, time: float) -> list[Group]:
        """Finished groups in no recorded step whose rollout began before ``time``."""
        return [one.group for place, one in self._outcomes.items() if self._began[place] < time]

    def window(self, place: int) -> tuple[int, int]:
        """The batch's worth of places that holds this one, and its size: the last of a run may be smaller."""
        number = place // self._size
        return number, self._size if self._end is None else min(self._size, self._end - number * self._size)

    # --- rules ----------------------------------------------------------------------------------------------------------

    @property
    def _has_more(self) -> bool:
        """Some group can still be started, now or later."""
        return bool(self._lost) or self._end is None or self._next < self._end

    @property
    def _is_due(self) -> bool:
        """A finished group must join the open step: :meth:`take` comes before closing it."""
        return any(group and self._last_step(version) <= self.step for version, group in self._ready.items())

    def _join(self, place: int, group: Group, version: int, *, is_cut: bool) -> GroupOutcome:
        """A group has finished: it waits for a step, or is replaced (dynamic sampling)."""
        settings = self._pipeline
        reason = drop_reason(
            group, drop_constant_groups=self._learning.drop_constant_groups, min_members=settings.min_members
        )
        if reason == CONSTANT_REWARD and len(self._replaced) < settings.refill_groups:
            self._replaced.append(place)
        else:
            self._ready[version].append(place)
        outcome = GroupOutcome(place, group, STEP_TIME_LIMIT if is_cut and reason == TOO_FEW else reason)
        self._outcomes[place] = outcome
        return outcome

    def _last_step(self, version: int) -> int:
        last, steps = version + 1 + self._pipeline.max_staleness, self._learning.steps
        return last if steps is None else min(last, steps)

    def _end_of(self, place: int) -> int:
        """Removes a running group; returns its start version."""
        version = self._running.pop(place)
        self._cut.discard(place)
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
            room = (step - self._closed) * self._size + self._pipeline.spare_groups
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
