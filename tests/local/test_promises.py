from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from searchr1_async.local.promises import (
    AlreadyTaken,
    CompletionLog,
    Failure,
    PromiseStore,
    Reply,
    Sequence,
    UnknownPromise,
)

pytestmark = pytest.mark.anyio

DONE = Reply(b"{}")


async def test_an_outcome_wakes_waiters_and_can_be_read_again() -> None:
    store = PromiseStore()
    promise = store.open("Sample", "me")
    assert await store.wait(promise, 0.0) is None
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(store.wait(promise, 30.0))
        await asyncio.sleep(0)
        assert store.settle(promise, DONE, now=1.0)
    assert waiting.result() is DONE
    assert await store.wait(store.get(promise.request_id), 0.0) is DONE


async def test_the_same_key_finds_the_first_promise() -> None:
    store = PromiseStore()
    promise = store.open("OptimStep", "model", key=("model", 1))
    assert store.find(("model", 1)) is promise
    assert store.find(("model", 2)) is None
    assert store.find(None) is None
    with pytest.raises(ValueError, match="in use"):
        store.open("OptimStep", "model", key=("model", 1))


async def test_only_the_first_outcome_counts() -> None:
    store = PromiseStore()
    promise = store.open("Sample", "me")
    store.settle(promise, DONE, now=0.0)
    assert not store.settle(promise, Failure("late", "server"), now=0.0)
    assert promise.outcome is DONE


async def test_cancelling_stops_the_work_once() -> None:
    store = PromiseStore()
    stopped: list[str] = []
    promise = store.open("Sample", "me")
    promise.on_cancel = lambda: stopped.append("work")
    assert store.cancel(promise, now=0.0)
    assert not store.cancel(promise, now=0.0)
    assert stopped == ["work"]
    assert isinstance(promise.outcome, Failure)
    assert promise.outcome.category == "user"


async def test_work_without_a_way_to_stop_is_not_cancelled() -> None:
    store = PromiseStore()
    promise = store.open("OptimStep", "me")
    assert not store.cancel(promise, now=0.0)
    assert promise.outcome is None


async def test_results_are_dropped_some_time_after_being_fetched() -> None:
    store = PromiseStore(grace=10.0, unfetched=100.0)
    fetched, unfetched, pending = (store.open("Sample", "me", key=n) for n in range(3))
    store.settle(fetched, DONE, now=0.0)
    store.settle(unfetched, DONE, now=0.0)
    store.fetched(fetched, now=5.0)
    store.fetched(fetched, now=6.0)
    assert store.sweep(now=15.9) == 0
    assert store.sweep(now=16.0) == 1
    assert store.find(0) is None
    with pytest.raises(UnknownPromise) as expired:
        store.get(fetched.request_id)
    assert expired.value.expired
    assert store.sweep(now=100.0) == 1
    assert store.sweep(now=1e9) == 0
    assert store.get(pending.request_id) is pending


async def test_memory_of_fetched_results_is_bounded() -> None:
    store = PromiseStore(grace=1e9, fetched_bytes=250)
    promises = [store.open("Sample", "me") for _ in range(5)]
    for promise in promises:
        store.settle(promise, Reply(b"x" * 100), now=0.0)
    assert store.sweep(now=1.0) == 0, "unfetched results are kept"
    for promise in promises:
        store.fetched(promise, now=1.0)
    assert store.sweep(now=1.0) == 3
    assert len(store) == 2
    store.get(promises[-1].request_id)


@pytest.mark.parametrize("request_id", ["", "x", "x-1", "-1", "deadbeef-1"])
async def test_ids_of_other_processes_are_unknown_rather_than_expired(request_id: str) -> None:
    store = PromiseStore()
    store.open("Sample", "me")
    with pytest.raises(UnknownPromise) as unknown:
        store.get(request_id)
    assert not unknown.value.expired


async def test_a_log_lists_entries_after_a_cursor() -> None:
    store, log = PromiseStore(grace=0.0), CompletionLog()
    first, second, third = (store.open("Sample", "me") for _ in range(3))
    for promise in (first, second, third):
        promise.log = log
    assert await log.after(0, 0.0) == ([], 0)
    store.settle(second, DONE, now=0.0)
    assert await log.after(0, 0.0) == ([second], 1)
    assert await log.after(0, 0.0) == ([second], 1), "a lost response can be requested again"
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(log.after(1, 30.0))
        await asyncio.sleep(0)
        store.settle(first, DONE, now=0.0)
    assert waiting.result() == ([first], 2)
    store.settle(third, DONE, now=0.0)
    store.fetched(third, now=0.0)
    store.sweep(now=1.0)
    assert await log.after(2, 0.0) == ([], 3), "forgotten promises leave the log"


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
