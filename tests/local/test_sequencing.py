from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from searchr1_async.local.promises import AlreadyTaken, Sequence


@given(st.permutations(range(1, 30)))
def test_any_order_of_arrival_gives_the_order_of_the_numbers(arrivals: list[int]) -> None:
    sequence: Sequence[int] = Sequence()
    released = [item for number in arrivals for item in sequence.offer(number, number, now=0.0)]
    assert released == sorted(arrivals)
    assert sequence.deadline() is None


def test_chunks_posted_with_the_first_one_last() -> None:
    sequence: Sequence[str] = Sequence()
    assert sequence.offer(2, "second", 0.0) == []
    assert sequence.offer(3, "third", 0.0) == []
    assert sequence.missing() == range(1, 2)
    assert sequence.offer(1, "first", 0.0) == ["first", "second", "third"]


def test_a_number_is_taken_once() -> None:
    sequence: Sequence[str] = Sequence()
    sequence.offer(1, "ran", 0.0)
    sequence.offer(3, "waits", 0.0)
    for number in (1, 3):
        with pytest.raises(AlreadyTaken):
            sequence.offer(number, "again", 0.0)
    assert sequence.offer(2, "late", 0.0) == ["late", "waits"]


def test_items_without_a_number_come_in_order_of_arrival() -> None:
    sequence: Sequence[str] = Sequence()
    assert sequence.offer(None, "a", 0.0) == ["a"]
    assert sequence.offer(3, "c", 0.0) == []
    assert sequence.offer(None, "d", 0.0) == []
    assert sequence.offer(2, "b", 0.0) == ["b", "c", "d"]


def test_waiting_for_a_missing_number_ends() -> None:
    sequence: Sequence[str] = Sequence(patience=10.0)
    sequence.offer(1, "ran", 0.0)
    sequence.offer(4, "d", 5.0)
    sequence.offer(3, "c", 6.0)
    assert sequence.deadline() == 15.0
    assert sequence.give_up(14.9) == (range(0), [])
    assert sequence.give_up(15.0) == (range(2, 3), ["c", "d"])
    with pytest.raises(AlreadyTaken):
        sequence.offer(2, "too late", 16.0)
    assert sequence.offer(5, "e", 16.0) == ["e"]


def test_progress_restarts_the_patience() -> None:
    sequence: Sequence[str] = Sequence(patience=10.0)
    sequence.offer(2, "b", 0.0)
    sequence.offer(4, "d", 1.0)
    assert sequence.offer(1, "a", 8.0) == ["a", "b"]
    assert sequence.deadline() == 18.0


def test_draining_returns_waiting_items() -> None:
    sequence: Sequence[str] = Sequence()
    sequence.offer(3, "c", 0.0)
    sequence.offer(2, "b", 0.0)
    assert sequence.drain() == ["b", "c"]
    assert sequence.deadline() is None


class SequenceMachine(RuleBasedStateMachine):
    """Every item is either released once, in increasing order, or dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence: Sequence[int] = Sequence(patience=5.0)
        self.now = 0.0
        self.taken: set[int] = set()
        self.released: list[int] = []
        self.dropped: set[int] = set()

    @rule(number=st.integers(1, 20), wait=st.floats(0, 4))
    def offer(self, number: int, wait: float) -> None:
        self.now += wait
        over = number in self.taken or number < self.sequence.next_number
        try:
            self.released += self.sequence.offer(number, number, self.now)
        except AlreadyTaken:
            assert over
        else:
            assert not over
            self.taken.add(number)

    @rule(wait=st.floats(0, 8))
    def give_up(self, wait: float) -> None:
        self.now += wait
        _, dropped = self.sequence.give_up(self.now)
        self.dropped.update(dropped)

    @invariant()
    def nothing_is_lost_or_out_of_order(self) -> None:
        assert self.released == sorted(set(self.released))
        waiting = self.taken - set(self.released) - self.dropped
        assert (self.sequence.deadline() is not None) == bool(waiting)
        assert all(number >= self.sequence.next_number for number in waiting)


TestSequenceMachine = SequenceMachine.TestCase
