"""Gathering against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from searchr1_async.search.dispatch import Gathering, is_worth_sending


def test_what_arrives_while_a_batch_is_away_makes_the_next() -> None:
    gathering: Gathering[str, int] = Gathering()
    gathering.ask(["a"], 1)
    assert gathering.take(10) == ["a"]
    gathering.ask(["b", "c"], 2)
    gathering.ask(["c", "d"], 3)
    assert gathering.finish(("a",)) == {"a": {1}}
    assert gathering.take(10) == ["b", "c", "d"]
    assert gathering.finish(("b", "c", "d")) == {"b": {2}, "c": {2, 3}, "d": {3}}
    assert gathering.take(10) == []


def test_equal_keys_are_asked_once_even_when_on_their_way() -> None:
    gathering: Gathering[str, int] = Gathering()
    assert gathering.ask(["a", "a"], 1) == 1
    gathering.take(10)
    assert gathering.ask(["a", "b"], 2) == 1
    assert gathering.take(10) == ["b"]
    assert gathering.finish(("a",)) == {"a": {1, 2}}
    assert gathering.ask(["a"], 3) == 0


def test_a_batch_has_a_limit_and_the_oldest_go_first() -> None:
    gathering: Gathering[str, int] = Gathering()
    for number, key in enumerate("abc"):
        gathering.ask(key, number)
    assert gathering.take(2) == ["a", "b"]
    assert gathering.waiters_of(["a", "b"]) == {0, 1}
    gathering.give_back(("a", "b"))
    assert gathering.everyone() == {0, 1, 2}
    assert gathering.take(2) == ["a", "b"]
    assert gathering.take(2) == ["c"]


@pytest.mark.parametrize(
    ("waiting", "in_flight", "is_worth"),
    [(1, 0, True), (1, 3, True), (1, 4, False), (2, 4, True), (9, 20, False), (10, 20, True), (30, 1_000, True)],
)
def test_a_small_batch_joins_only_a_few_in_the_air(waiting: int, in_flight: int, is_worth: bool) -> None:
    assert is_worth_sending(waiting, in_flight, max_keys=30) is is_worth


def test_a_call_with_many_keys_takes_turns_with_those_after_it() -> None:
    gathering: Gathering[str, int] = Gathering()
    gathering.ask([f"many{number}" for number in range(20)], 1)
    for number in range(3):
        gathering.ask([f"single{number}"], 2 + number)
    assert set(gathering.take(4)) == {"many0", "single0", "single1", "single2"}
    gathering.ask(["pair0", "pair1"], 9)
    assert gathering.take(4) == ["many1", "pair0", "many2", "pair1"]


def test_nobody_waits_for_ever() -> None:
    gathering: Gathering[str, int] = Gathering()
    gathering.ask([f"many{number}" for number in range(20)], 0)
    taken: list[str] = []
    for number in range(40):  # there is always a new waiter
        gathering.ask([f"new{number}"], number + 1)
        taken += gathering.take(2)
    assert {f"many{number}" for number in range(20)} <= set(taken)


def test_who_joins_a_late_key_gets_it_sooner() -> None:
    gathering: Gathering[str, int] = Gathering()
    gathering.ask([f"many{number}" for number in range(20)], 1)
    gathering.ask(["many19"], 2)
    assert gathering.take(2) == ["many0", "many19"]
    assert len(gathering.take(30)) == 18


def test_what_nobody_waits_for_is_not_sent() -> None:
    gathering: Gathering[str, int] = Gathering()
    gathering.ask(["a", "b"], 1)
    gathering.ask(["b"], 2)
    gathering.leave(["a", "b"], 1)
    assert gathering.take(10) == ["b"]
    gathering.leave(["b"], 2)
    gathering.give_back(("b",))
    assert gathering.take(10) == []
    gathering.ask(["a"], 3)
    gathering.ask(["a"], 4)
    gathering.leave(["a"], 3)
    assert gathering.take(10) == ["a"]


class GatheringMachine(RuleBasedStateMachine):
    """Any order of operations: no waiter is ever forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.gathering: Gathering[int, int] = Gathering()
        self.open: dict[int, set[int]] = {}
        """Waiter → keys it still waits for."""
        self.batches: list[list[int]] = []
        self.waiters = 0

    @rule(keys=st.lists(st.integers(0, 6), min_size=1, max_size=4))
    def ask(self, keys: list[int]) -> None:
        self.waiters += 1
        known = {key for waits in self.open.values() for key in waits} | {key for b in self.batches for key in b}
        assert self.gathering.ask(keys, self.waiters) == len(keys) - len(set(keys) - known)
        self.open[self.waiters] = set(keys)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(sorted(self.open)))
        self.gathering.leave(self.open.pop(waiter), waiter)

    @rule()
    def take(self) -> None:
        batch = self.gathering.take(3)
        assert len(batch) <= 3
        assert batch or not self.gathering.waiting
        away = {key for other in self.batches for key in other}
        assert not away & set(batch)
        assert set(batch) <= {key for waits in self.open.values() for key in waits}
        if batch:
            self.batches.append(batch)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        batch = self.batches.pop(data.draw(st.integers(0, len(self.batches) - 1)))
        for key, waiters in self.gathering.finish(batch).items():
            assert waiters == {waiter for waiter, waits in self.open.items() if key in waits}
            for waiter in waiters:
                self.open[waiter].discard(key)
        self.open = {waiter: waits for waiter, waits in self.open.items() if waits}

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        batch = self.batches.pop(data.draw(st.integers(0, len(self.batches) - 1)))
        self.gathering.give_back(batch)

    @invariant()
    def whoever_waits_is_waiting_or_sent(self) -> None:
        wanted = {key for waits in self.open.values() for key in waits}
        away = {key for batch in self.batches for key in batch}
        assert self.gathering.waiting == len(wanted - away)
        assert self.gathering.everyone() == {waiter for waiter, waits in self.open.items() if waits}


TestGatheringMachine = GatheringMachine.TestCase
TestGatheringMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
