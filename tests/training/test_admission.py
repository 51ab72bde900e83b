from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.config import PipelineSettings
from searchr1_async.training.admission import Admission, Closed

SIZES = st.integers(1, 5)


class World:
    """Runs an admission at random: groups end in any order, weights appear some time after their step closes."""

    def __init__(self, admission: Admission, draw: st.DataObject, *, constant: bool) -> None:
        self.admission = admission
        self.draw = draw
        self.constant = constant
        self.began: dict[int, int] = {}
        self.closed: list[Closed] = []
        self.unpublished: list[int] = []
        self.most_running = 0

    def start_all(self) -> None:
        while (place := self.admission.next_start()) is not None:
            assert place not in self.began or place in self.admission.open_places
            self.admission.started(place)
            self.began[place] = self.admission.version
        self.most_running = max(self.most_running, len(self.admission.running))

    def run(self, steps: int | None = None) -> None:
        """Until the run is over or ``steps`` more are closed."""
        goal = None if steps is None else len(self.closed) + steps
        for _ in range(10_000):
            self.start_all()
            self.admission.take()
            has_changed = bool(self.admission.running) and self.draw.draw(st.booleans())
            if has_changed:
                # While the caller submits minibatches.
                self.admission.finished(self.draw.draw(st.sampled_from(self.admission.running)))
            if self.admission.is_full:
                self.closed.append(self.admission.close())
                self.unpublished.append(self.closed[-1].step)
                if goal is not None and len(self.closed) >= goal:
                    return
                continue
            if self.admission.is_over:
                return
            if has_changed:
                continue
            choices = [*self.admission.running, *(["publish"] if self.unpublished else [])]
            assert choices, "nothing runs and nothing can start: deadlock"
            choice = self.draw.draw(st.sampled_from(choices))
            if choice == "publish":
                self.admission.published(self.unpublished.pop(0))
            else:
                is_constant = self.constant and self.draw.draw(st.booleans())
                self.admission.finished(choice, is_constant=is_constant)
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
    world = World(Admission(pipeline, size, end=places), draw, constant=refill > 0)
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
    world = World(Admission(pipeline, size, steps=steps), draw, constant=False)
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
    first = World(Admission(pipeline, size, end=places), draw, constant=False)
    first.run(steps=draw.draw(st.integers(0, 4)))
    for _ in range(draw.draw(st.integers(0, 6))):
        if first.admission.running:
            first.admission.finished(draw.draw(st.sampled_from(first.admission.running)))
    durable = min(durable, len(first.closed))
    done = [place for step in first.closed[:durable] for place in (*step.taken, *step.cancelled)]
    open_places = set(range(first.admission.next_place)) - set(done)
    running = set(first.admission.running)
    finished = {place: first.began[place] for place in open_places - running if first.began[place] <= durable}
    again = Admission(pipeline, size, next_place=first.admission.next_place, end=places, step=durable)
    again.restore(finished, open_places - set(finished))
    second = World(again, draw, constant=False)
    second.began.update(finished)
    assert set(again.open_places) == open_places
    second.run()
    seen = Counter(place for step in second.closed for place in (*step.taken, *step.cancelled))
    assert seen + Counter(done) == Counter(range(places))
    for step in second.closed:
        assert all(step.step <= second.began[place] + 1 + staleness for place in step.taken), "too stale"


def test_on_policy_nothing_starts_until_the_weights_are_there() -> None:
    admission = Admission(PipelineSettings(), 2, end=4)
    for place in (0, 1):
        assert admission.next_start() == place
        admission.started(place)
    assert admission.next_start() is None
    admission.finished(1)
    assert admission.take() == [1]
    assert not admission.is_full
    admission.finished(0)
    assert admission.take() == [0]
    assert admission.close() == Closed(1, (1, 0), (), ())
    assert admission.next_start() is None
    admission.published(1)
    assert admission.next_start() == 2


def test_one_batch_of_staleness_lets_the_slowest_have_a_step_more() -> None:
    admission = Admission(PipelineSettings(max_staleness=1), 2, end=8)
    for place in range(4):
        admission.started(place)
    assert admission.next_start() is None
    for place in (3, 1):
        admission.finished(place)
    assert admission.take() == [3, 1]
    assert admission.close().taken == (3, 1)
    admission.published(1)
    for place in (4, 5):
        admission.started(place)
    admission.finished(4)
    assert admission.take() == [], "0 and 2 are due in this step and leave no room for newer ones"
    admission.finished(2)
    admission.finished(0)
    assert admission.take() == [2, 0]


@pytest.mark.parametrize("spare", [0, 1])
def test_spare_groups_spare_the_slowest(spare: int) -> None:
    admission = Admission(PipelineSettings(spare_groups=spare), 2, end=9)
    while (place := admission.next_start()) is not None:
        admission.started(place)
    assert len(admission.running) == 2 + spare
    for place in (0, 1):
        admission.finished(place)
    admission.take()
    assert admission.is_full
    assert admission.close().cancelled == ((2,) if spare else ())


def test_a_constant_group_is_played_for_again_within_the_budget() -> None:
    admission = Admission(PipelineSettings(refill_groups=1), 2, end=9)
    for place in (0, 1):
        admission.started(place)
    assert admission.finished(0, is_constant=True)
    assert admission.next_start() == 2
    admission.started(2)
    assert not admission.finished(2, is_constant=True), "the budget is spent, so it joins the batch"
    assert not admission.finished(1)
    admission.take()
    assert admission.close() == Closed(1, (2, 1), (0,), ())
