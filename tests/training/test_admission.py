from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.config import PipelineSettings, RunLearning, TrainConfig
from searchr1_async.episodes.types import Episode, Group, Question, StopReason, Turn
from searchr1_async.training.admission import Admission, Closed, drop_reason

SIZES = st.integers(1, 5)
QUESTION = Question("q", "?", ("a",))


def group(*rewards: float, version: int = 0) -> Group:
    turn = Turn((1,), (-1.0,), "x", policy_version=version)
    return Group(QUESTION, tuple(Episode(QUESTION, (1,), (turn,), StopReason.ANSWER, reward=one) for one in rewards))


GOOD, CONSTANT = group(0, 1), group(1, 1)


def admission_of(
    pipeline: PipelineSettings, size: int, end: int = 1, *, steps: int | None = None, **more: int
) -> Admission:
    sizes = TrainConfig(group_size=2, groups_per_batch=size, minibatches=1, steps=steps, epochs=1, lora_rank=32)
    learning = RunLearning.of(sizes)
    return Admission(pipeline, learning, end, **more)


def taken(admission: Admission) -> list[int]:
    return [outcome.place for outcome in admission.take()]


def dropped(admission: Admission, place: int, ended: Group) -> str | None:
    outcome = admission.finished(place, ended)
    assert outcome is not None
    return outcome.drop_reason


def close(admission: Admission) -> Closed:
    """Groups that were too slow have finished nothing."""
    return admission.close({place: group() for place in admission.must_come()})


class World:
    """Runs an admission at random: groups end in any order, weights appear some time after their step closes."""

    def __init__(self, admission: Admission, draw: st.DataObject, *, constant: bool) -> None:
        self.admission = admission
        self.draw = draw
        self.constant = constant
        self.began: dict[int, int] = {}
        self.running: list[int] = []
        self.closed: list[Closed] = []
        self.unpublished: list[int] = []
        self.most_running = 0

    def start_all(self) -> None:
        while (place := self.admission.next_start()) is not None:
            assert place not in self.began or place in self.admission.open_places
            self.admission.started(place)
            self.began[place] = self.admission.version
            self.running.append(place)
        self.most_running = max(self.most_running, len(self.running))

    def finish(self, place: int, group: Group) -> None:
        self.running.remove(place)
        self.admission.finished(place, group)

    def run(self, steps: int | None = None) -> None:
        """Until the run is over or ``steps`` more are closed."""
        goal = None if steps is None else len(self.closed) + steps
        for _ in range(10_000):
            self.start_all()
            self.admission.take()
            has_changed = bool(self.running) and self.draw.draw(st.booleans())
            if has_changed:
                # While the caller submits minibatches.
                self.finish(self.draw.draw(st.sampled_from(self.running)), GOOD)
            if self.admission.is_full:
                self.closed.append(close(self.admission))
                self.running = [place for place in self.running if place not in self.closed[-1].cancelled]
                self.unpublished.append(self.closed[-1].step)
                if goal is not None and len(self.closed) >= goal:
                    return
                continue
            if self.admission.is_over:
                return
            if has_changed:
                continue
            choices = [*self.running, *(["publish"] if self.unpublished else [])]
            assert choices, "nothing runs and nothing can start: deadlock"
            choice = self.draw.draw(st.sampled_from(choices))
            if choice == "publish":
                self.admission.published(self.unpublished.pop(0))
            else:
                is_constant = self.constant and self.draw.draw(st.booleans())
                self.finish(choice, CONSTANT if is_constant else GOOD)
        raise AssertionError("the run does not end")


@given(
    draw=st.data(),
    size=SIZES,
    staleness=st.integers(0, 3),
    spare=st.integers(0, 3),
    refill=st.integers(0, 3),
    places=st.integers(1, 30),
)
@settings(max_examples=300, deadline=None)
def test_every_group_is_taken_once_and_in_time(
    draw: st.DataObject, size: int, staleness: int, spare: int, refill: int, places: int
) -> None:
    pipeline = PipelineSettings(max_staleness=staleness, spare_groups=spare, refill_groups=refill)
    world = World(admission_of(pipeline, size, places), draw, constant=refill > 0)
    world.run()
    seen = Counter(place for step in world.closed for place in (*step.taken, *step.replaced, *step.cancelled))
    assert seen == Counter(range(places)), "every place in exactly one step"
    for step in world.closed:
        assert all(step.step <= world.began[place] + 1 + staleness for place in step.taken), "too stale"
        assert len(step.cancelled) <= spare
        assert len(step.replaced) <= refill
        if step is not world.closed[-1]:
            assert size <= len(step.taken) <= size + spare, "spare groups that have just ended are taken too"
        if step.cancelled:
            assert len(step.taken) >= size, "nothing is cancelled while there is room"
    assert [step.step for step in world.closed] == list(range(1, len(world.closed) + 1))
    assert world.most_running <= size * (staleness + 1) + spare


@given(draw=st.data(), size=SIZES, staleness=st.integers(0, 2), spare=st.integers(0, 2), steps=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_a_run_of_some_steps_starts_no_more_than_it_trains_on(
    draw: st.DataObject, size: int, staleness: int, spare: int, steps: int
) -> None:
    pipeline = PipelineSettings(max_staleness=staleness, spare_groups=spare)
    world = World(admission_of(pipeline, size, steps=steps), draw, constant=False)
    world.run()
    assert len(world.closed) == steps
    assert all(size <= len(step.taken) <= size + spare for step in world.closed)
    assert len(world.began) <= steps * (size + spare)
    assert not world.admission.open_places


@given(
    draw=st.data(),
    size=SIZES,
    staleness=st.integers(0, 2),
    spare=st.integers(0, 2),
    places=st.integers(4, 24),
    durable=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_what_a_kill_left_open_is_taken_once_after_it(
    draw: st.DataObject, size: int, staleness: int, spare: int, places: int, durable: int
) -> None:
    """Killed with some steps recorded and more closed: finished groups of existing weights are kept."""
    pipeline = PipelineSettings(max_staleness=staleness, spare_groups=spare)
    first = World(admission_of(pipeline, size, places), draw, constant=False)
    first.run(steps=draw.draw(st.integers(0, 4)))
    for _ in range(draw.draw(st.integers(0, 6))):
        if first.running:
            first.finish(draw.draw(st.sampled_from(first.running)), GOOD)
    durable = min(durable, len(first.closed))
    done = [place for step in first.closed[:durable] for place in (*step.taken, *step.cancelled)]
    open_places = set(range(first.admission.next_place)) - set(done)
    running = set(first.running)
    finished = {place: first.began[place] for place in open_places - running if first.began[place] <= durable}
    again = admission_of(pipeline, size, places, next_place=first.admission.next_place, step=durable)
    kept = {place: group(0, 1, version=first.began[place]) for place in open_places - running}
    assert again.restore(kept, open_places) == set(finished)
    second = World(again, draw, constant=False)
    second.began.update(finished)
    assert set(again.open_places) == open_places
    second.run()
    seen = Counter(place for step in second.closed for place in (*step.taken, *step.cancelled))
    assert seen + Counter(done) == Counter(range(places))
    for step in second.closed:
        assert all(step.step <= second.began[place] + 1 + staleness for place in step.taken), "too stale"


def test_on_policy_nothing_starts_until_the_weights_are_there() -> None:
    admission = admission_of(PipelineSettings(), 2, 4)
    for place in (0, 1):
        assert admission.next_start() == place
        admission.started(place)
    assert admission.next_start() is None
    admission.finished(1, GOOD)
    assert taken(admission) == [1]
    assert not admission.is_full
    admission.finished(0, GOOD)
    assert taken(admission) == [0]
    assert close(admission) == Closed(1, (1, 0), (), ())
    assert admission.next_start() is None
    admission.published(1)
    assert admission.next_start() == 2


def test_one_batch_of_staleness_lets_the_slowest_have_a_step_more() -> None:
    admission = admission_of(PipelineSettings(max_staleness=1), 2, 8)
    for place in range(4):
        admission.started(place)
    assert admission.next_start() is None
    for place in (3, 1):
        admission.finished(place, GOOD)
    assert taken(admission) == [3, 1]
    assert close(admission).taken == (3, 1)
    admission.published(1)
    for place in (4, 5):
        admission.started(place)
    admission.finished(4, GOOD)
    assert taken(admission) == [], "0 and 2 are due in this step and leave no room for newer ones"
    admission.finished(2, GOOD)
    admission.finished(0, GOOD)
    assert taken(admission) == [2, 0]


@pytest.mark.parametrize("spare", [0, 1])
def test_spare_groups_spare_the_slowest(spare: int) -> None:
    admission = admission_of(PipelineSettings(spare_groups=spare), 2, 9)
    started: list[int] = []
    while (place := admission.next_start()) is not None:
        admission.started(place)
        started.append(place)
    assert len(started) == 2 + spare
    for place in (0, 1):
        admission.finished(place, GOOD)
    admission.take()
    assert admission.is_full
    assert close(admission).cancelled == ((2,) if spare else ())


def test_a_constant_group_is_played_for_again_within_the_budget() -> None:
    admission = admission_of(PipelineSettings(refill_groups=1), 2, 9)
    for place in (0, 1):
        admission.started(place)
    assert dropped(admission, 0, CONSTANT) == "constant_reward"
    assert admission.next_start() == 2
    admission.started(2)
    assert dropped(admission, 2, CONSTANT) == "constant_reward", "the budget is spent, so it joins the batch"
    assert dropped(admission, 1, GOOD) is None
    admission.take()
    assert close(admission) == Closed(1, (2, 1), (0,), ())


@given(draw=st.data(), size=SIZES, staleness=st.integers(0, 2), spare=st.integers(0, 2), refill=st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_a_place_is_open_until_its_own_step_is_recorded(
    draw: st.DataObject, size: int, staleness: int, spare: int, refill: int
) -> None:
    """Whatever was recorded when the run was killed: each place is in a recorded step or open, never both."""
    pipeline = PipelineSettings(max_staleness=staleness, spare_groups=spare, refill_groups=refill)
    world = World(admission_of(pipeline, size, 20), draw, constant=refill > 0)
    world.run(steps=draw.draw(st.integers(1, 4)))
    recorded: list[int] = []
    for closed in world.closed:
        assert [one.place for one in world.admission.outcomes(closed)] == list(closed.places)
        reasons = {one.place: one.drop_reason for one in world.admission.outcomes(closed)}
        assert all(reasons[place] == "too_slow" for place in closed.cancelled)
        assert all(reasons[place] == "constant_reward" for place in closed.replaced)
        recorded += closed.places
        open_places = world.admission.open_after(closed.step)
        assert sorted((*recorded, *open_places)) == list(range(world.admission.next_place))
        assert [one.place for one in world.admission.recorded(closed.step)] == list(closed.places)
        assert world.admission.open_after(closed.step) == open_places
    assert world.admission.open_after(len(world.closed)) == world.admission.open_places


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_step_past_its_time_is_full_once_the_groups_cut_have_ended(staleness: int) -> None:
    admission = admission_of(PipelineSettings(max_staleness=staleness), 2, 9)
    while (place := admission.next_start()) is not None:
        admission.started(place)
    admission.finished(1, GOOD)
    assert taken(admission) == [1]
    assert admission.cut_open_step() == (0,), "as many as the batch lacks, those that began first"
    assert admission.next_start() is None
    assert not admission.is_full
    assert dropped(admission, 0, group(1)) == "step_time_limit"
    assert taken(admission) == [0]
    assert admission.is_full
    assert close(admission) == Closed(1, (1, 0), (), ())
    admission.published(1)
    assert admission.next_start() == (4 if staleness else 2), "the limit was that step's"


def test_a_cut_group_that_is_large_enough_is_trained_on() -> None:
    admission = admission_of(PipelineSettings(), 1, 9)
    admission.started(0)
    admission.cut_open_step()
    assert dropped(admission, 0, GOOD) is None


def test_a_group_that_its_step_did_not_wait_for_is_not_asked_about_again() -> None:
    admission = admission_of(PipelineSettings(spare_groups=1), 1, 9)
    for place in (0, 1):
        admission.started(place)
    admission.finished(0, GOOD)
    admission.take()
    closed = close(admission)
    assert (closed.taken, closed.cancelled) == ((0,), (1,))
    assert admission.finished(1, GOOD) is None
    assert [one.drop_reason for one in admission.outcomes(closed)] == [None, "too_slow"]


def test_restored_groups_have_the_reason_that_they_had() -> None:
    """A group that is not whole was cut; a lost one is rolled out first."""
    admission = admission_of(PipelineSettings(refill_groups=1), 3, 9, next_place=4, step=1)
    kept = {1: group(0), 2: CONSTANT, 3: group(0, 1, version=2), 5: GOOD}
    assert admission.restore(kept, (0, 1, 2, 3)) == {1, 2, 5}
    assert admission.open_places == (0, 1, 2, 3, 4, 5)
    assert [admission.next_start(), admission.next_place] == [0, 6]
    assert taken(admission) == [1, 5]
    admission.started(0)
    admission.finished(0, GOOD)
    admission.take()
    closed = close(admission)
    assert closed == Closed(2, (1, 5, 0), (2,), ())
    assert [one.drop_reason for one in admission.outcomes(closed)] == [
        "step_time_limit",
        None,
        None,
        "constant_reward",
    ]


def test_a_window_is_a_batchs_worth_of_places() -> None:
    admission = admission_of(PipelineSettings(), 4, 10)
    assert [admission.window(place) for place in (0, 3, 4, 9)] == [(0, 4), (0, 4), (1, 4), (2, 2)]
    assert admission_of(PipelineSettings(), 4, 10, steps=9).window(9) == (2, 4)


def test_constant_and_tiny_groups_are_dropped_for_a_reason() -> None:
    assert drop_reason(group(1, 1), drop_constant_groups=True) == "constant_reward"
    assert drop_reason(group(1, 1), drop_constant_groups=False) is None
    assert drop_reason(group(1), drop_constant_groups=False) == "too_few_episodes"
    assert drop_reason(group(1, 0), drop_constant_groups=True) is None
    assert drop_reason(group(1, 0, 1), drop_constant_groups=True, min_members=4) == "too_few_episodes"
