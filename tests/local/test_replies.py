from __future__ import annotations

import asyncio

import pytest

from searchr1_async.local.replies import Failure, Gone, NotFound, PromiseStore, Reply

pytestmark = pytest.mark.anyio

DONE = Reply(b"{}")


async def test_an_outcome_wakes_waiters_and_can_be_read_again() -> None:
    store = PromiseStore()
    promise = store.open("me")
    assert await store.wait(promise, 0.0) is None
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(store.wait(promise, 30.0))
        await asyncio.sleep(0)
        assert store.settle(promise, DONE, now=1.0)
    assert waiting.result() is DONE
    assert await store.wait(store.get(promise.request_id), 0.0) is DONE


async def test_the_same_key_finds_the_first_promise() -> None:
    store = PromiseStore()
    promise = store.open("model", key=("model", 1))
    assert store.find(("model", 1)) is promise
    assert store.find(("model", 2)) is None
    assert store.find(None) is None
    with pytest.raises(ValueError, match="in use"):
        store.open("model", key=("model", 1))


async def test_only_the_first_outcome_counts() -> None:
    store = PromiseStore()
    promise = store.open("me")
    store.settle(promise, DONE, now=0.0)
    assert not store.settle(promise, Failure("late", "server"), now=0.0)
    assert promise.outcome is DONE


async def test_cancelling_stops_the_work_once() -> None:
    store = PromiseStore()
    stopped: list[str] = []
    promise = store.open("me")
    promise.on_cancel = lambda: stopped.append("work")
    assert store.cancel(promise, now=0.0)
    assert not store.cancel(promise, now=0.0)
    assert stopped == ["work"]
    assert isinstance(promise.outcome, Failure)
    assert promise.outcome.category == "user"


async def test_work_without_a_way_to_stop_is_not_cancelled() -> None:
    store = PromiseStore()
    promise = store.open("me")
    assert not store.cancel(promise, now=0.0)
    assert promise.outcome is None


async def test_results_are_dropped_some_time_after_being_fetched() -> None:
    store = PromiseStore(grace=10.0, unfetched=100.0)
    fetched, unfetched, pending = (store.open("me", key=n) for n in range(3))
    store.settle(fetched, DONE, now=0.0)
    store.settle(unfetched, DONE, now=0.0)
    store.fetched(fetched, now=5.0)
    store.fetched(fetched, now=6.0)
    assert store.sweep(now=15.9) == 0
    assert store.sweep(now=16.0) == 1
    assert store.find(0) is None
    with pytest.raises(Gone):
        store.get(fetched.request_id)
    assert store.sweep(now=100.0) == 1
    assert store.sweep(now=1e9) == 0
    assert store.get(pending.request_id) is pending


async def test_memory_of_fetched_results_is_bounded() -> None:
    store = PromiseStore(grace=1e9, fetched_bytes=250)
    promises = [store.open("me") for _ in range(5)]
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
    store.open("me")
    with pytest.raises(NotFound):
        store.get(request_id)
