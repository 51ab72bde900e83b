"""Which group starts next, and which finished groups form a step's batch: bounded staleness as a pure state machine.

A group started under weights version v must be trained on by step v + 1 + ``max_staleness``, its *last step*. It starts only if it
and all untrained groups fit into the steps up to its own last step, and joins the open step only if the groups with earlier last
steps still fit. So no finished work is discarded. :class:`QuestionOrder` numbers the questions: one stream of places over all epochs.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from searchr1_async.config import PipelineSettings, RunLearning
from searchr1_async.episodes.types import DropReason, Group, GroupOutcome, Question


def drop_reason(group: Group, *, drop_constant_groups: bool, min_members: int = 2) -> DropReason | None:
    """Why a finished group is not trained on; None if it is."""
    if len(group.episodes) < min_members:
        return "too_few_episodes"
    return "constant_reward" if drop_constant_groups and group.is_constant else None


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
    """State of a run's groups. Report events, then ask :meth:`next_start`, :meth:`take` and :meth:`is_full`."""

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
        self.next_place = next_place
        """The first place never started."""
        self.version = step
        """Version of the newest weights."""
        self._closed = step
        self._lost: list[int] = []
        self._running: dict[int, int] = {}
        self._ready: dict[int, int] = {}
        """Start version of the groups that run, and of those that have finished and wait for a step, in order of completion."""
        self._taken: list[int] = []
        self._replaced: list[int] = []
        self._unrecorded: dict[int, Closed] = {}
        self._cut: set[int] = set()
        self._cut_step: int | None = None
        self._outcomes: dict[int, GroupOutcome] = {}

    # --- events ---------------------------------------------------------------------------------------------------------

    def restore(self, kept: Mapping[int, Group], open_places: Collection[int] = ()) -> set[int]:
        """Restores an earlier session's groups. All others that it started are rolled out again.

        Args:
            kept: its finished groups, by place.
            open_places: places of the resume point that were started and are in no recorded step.

        Returns:
            Places of the kept groups that are of use: those in no recorded step, sampled from weights that still exist.
        """
        end = max([self.next_place, *(place + 1 for place in kept)])
        lost = {*open_places, *range(self.next_place, end)}
        found: set[int] = set()
        for place, group in kept.items():
            versions = group.policy_versions or (self._closed,)
            # Turns of weights that were published but not saved belong to a future that is lost.
            if place in lost and versions[-1] <= self._closed:
                # A group that is not whole was cut by its step's time limit; one that was too slow is not kept.
                is_cut = len(group.episodes) + len(group.failed) < self._learning.group_size
                self._join(place, group, versions[0], is_cut=is_cut)
                found.add(place)
        self._lost, self.next_place = sorted(lost - found), end
        return found

    def started(self, place: int) -> None:
        """Records the start of the group named by :meth:`next_start`, under the newest weights."""
        if self._lost and self._lost[0] == place:
            self._lost.pop(0)
        else:
            assert place == self.next_place, f"place {place} was not next"
            self.next_place += 1
        self._running[place] = self.version

    def finished(self, place: int, group: Group) -> GroupOutcome | None:
        """Records the end of a group; None if its step was closed without it."""
        if place not in self._running:
            return None
        return self._join(place, group, self._running.pop(place), is_cut=place in self._cut)

    def published(self, version: int) -> None:
        """Records new weights; groups start under them from now on."""
        self.version = max(self.version, version)

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
            del self._running[place]
            self._outcomes[place] = GroupOutcome(place, slow[place], "too_slow")
        self._taken, self._replaced = [], []
        self._unrecorded[closed.step] = closed
        self._closed += 1
        return closed

    def recorded(self, step: int) -> list[GroupOutcome]:
        """A closed step is on disk: returns its groups, which are no longer known here."""
        return [self._outcomes.pop(place) for place in self._unrecorded.pop(step).places]

    # --- decisions ------------------------------------------------------------------------------------------------------

    def next_start(self) -> int | None:
        """Place of the group that may start now, or None."""
        if not self._has_more or self._cut_step == self.step:
            return None
        # No room until the next weights if groups of these would have to be trained on by now.
        room = max(0, self._last_step(self.version) - self._closed) * self._size
        under_way = len(self._taken) + len(self._running) + self.waiting
        if not room or under_way >= room + self._pipeline.spare_groups:
            return None
        return self._lost[0] if self._lost else self.next_place

    def take(self) -> list[GroupOutcome]:
        """Moves eligible groups into the open step, oldest weights first; returns them."""
        taken: list[int] = []
        for place, version in sorted(self._ready.items(), key=lambda group: group[1]):
            if not self._belongs(version):
                break  # those of newer weights have more time
            del self._ready[place]
            self._taken.append(place)
            taken.append(place)
        return [self._outcomes[place] for place in taken]

    @property
    def is_full(self) -> bool:
        """The open step is complete."""
        if any(self._last_step(version) <= self.step for version in self._ready.values()):
            return False  # :meth:`take` comes before closing it
        if self._cut_step == self.step and self._cut.isdisjoint(self._running):
            return True
        if len(self._taken) >= self._size:
            return len(self.must_come()) <= self._pipeline.spare_groups
        if self._running or self._ready or self.next_start() is not None:
            return False
        # All places are done. A batch of replaced groups only must still be recorded.
        return not self._has_more and bool(self._taken or self._replaced)

    @property
    def is_over(self) -> bool:
        """No step remains."""
        if self._learning.steps is not None and self._closed >= self._learning.steps:
            return True
        return not (self._taken or self._replaced or self._running or self._ready or self._has_more)

    def must_come(self) -> tuple[int, ...]:
        """Places of running groups that must join the open step."""
        return tuple(place for place, version in self._running.items() if self._last_step(version) <= self.step)

    # --- what is known --------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The open step, from 1."""
        return self._closed + 1

    @property
    def taken(self) -> int:
        """Groups in the open step."""
        return len(self._taken)

    @property
    def waiting(self) -> int:
        """Finished groups not yet in a step."""
        return len(self._ready)

    @property
    def open_places(self) -> tuple[int, ...]:
        """Places started in any session and not part of a closed step."""
        return tuple(sorted({*self._lost, *self._running, *self._ready, *self._taken, *self._replaced}))

    def open_after(self, step: int) -> tuple[int, ...]:
        """Places started in any session and not part of a step up to this one, which is the last to be recorded."""
        later = [closed.places for number, closed in self._unrecorded.items() if number > step]
        return tuple(sorted({*self.open_places, *itertools.chain.from_iterable(later)}))

    def outcomes(self, closed: Closed) -> tuple[GroupOutcome, ...]:
        """All groups of a closed step that is not recorded yet."""
        return tuple(self._outcomes[place] for place in closed.places)

    def window(self, place: int) -> tuple[int, int]:
        """The batch's worth of places that holds this one, and its size: the last of a run may be smaller."""
        number = place // self._size
        return number, self._size if self._end is None else min(self._size, self._end - number * self._size)

    # --- rules ----------------------------------------------------------------------------------------------------------

    @property
    def _has_more(self) -> bool:
        """Some group can still be started, now or later."""
        return bool(self._lost) or self._end is None or self.next_place < self._end

    def _join(self, place: int, group: Group, version: int, *, is_cut: bool) -> GroupOutcome:
        """A group has finished: it waits for a step, or is replaced (dynamic sampling)."""
        settings, drops = self._pipeline, self._learning.drop_constant_groups
        reason = drop_reason(group, drop_constant_groups=drops, min_members=settings.min_members)
        if reason == "constant_reward" and len(self._replaced) < settings.refill_groups:
            self._replaced.append(place)
        else:
            self._ready[place] = version
        outcome = GroupOutcome(place, group, "step_time_limit" if is_cut and reason == "too_few_episodes" else reason)
        self._outcomes[place] = outcome
        return outcome

    def _last_step(self, version: int) -> int:
        last, steps = version + 1 + self._pipeline.max_staleness, self._learning.steps
        return last if steps is None else min(last, steps)

    def _belongs(self, version: int) -> bool:
        """Whether a finished group of this version joins the open step."""
        last_step = self._last_step(version)
        if last_step <= self.step:
            return True
        if len(self._taken) >= self._size:
            return False
        # Groups with earlier last steps must still fit beside it.
        earlier = len(self._taken) + 1
        versions = Counter(itertools.chain(self._running.values(), self._ready.values()))
        for step in range(self.step, last_step):
            earlier += sum(count for other, count in versions.items() if max(self.step, self._last_step(other)) == step)
            if earlier > (step - self._closed) * self._size + self._pipeline.spare_groups:
                return False
        return True


class QuestionOrder:
    """Maps places (0, 1, 2, … over the whole run) to questions.

    A resume point and a sampling seed depend on a question only through its place.
    """

    def __init__(self, questions: Sequence[Question], *, seed: int) -> None:
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
