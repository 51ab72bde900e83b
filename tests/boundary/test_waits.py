"""Waits in virtual time: bounded, and reported once; and items prepared in a thread while the previous one is used."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.boundary.waits import PausableDeadlines, bounded_wait, pause, prepared_ahead, time_limit
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": True, "loop_factory": VirtualTimeLoop}


async def test_a_short_wait_is_not_reported() -> None:
    reported: list[str] = []
    with bounded_wait("the service is starting", reported.append, at_most=60):
        await anyio.sleep(4.9)
    await pause(4.9, "the service asked for it", reported.append)
    await anyio.sleep(60)
    assert reported == []


async def test_a_long_wait_is_reported_once_while_it_lasts() -> None:
    reported: list[str] = []
    began = anyio.current_time()
    with bounded_wait("the service is starting", reported.append, at_most=60):
        await anyio.sleep(5.1)
        assert len(reported) == 1
        await anyio.sleep(30)
    assert len(reported) == 1
    assert anyio.current_time() - began == pytest.approx(35.1)
    assert re.fullmatch(
        r"the service is starting: waiting for at most 55 s more, until (\S+ )?\d\d:\d\d:\d\d", reported[0]
    )


async def test_a_wait_ends_at_its_bound() -> None:
    reported: list[str] = []
    began = anyio.current_time()
    with pytest.raises(TimeoutError), bounded_wait("the service does not answer", reported.append, at_most=60):
        await anyio.sleep_forever()
    assert anyio.current_time() - began == pytest.approx(60)


async def test_a_pause_is_reported_at_its_start_with_the_date_if_it_differs() -> None:
    reported: list[str] = []
    await pause(3 * 86_400, "the service asked for it", reported.append)
    (sentence,) = reported
    assert re.fullmatch(
        r"the service asked for it: waiting for at most 259,200 s more, until \d{4}-\d\d-\d\d .*", sentence
    )


async def test_paused_time_does_not_count() -> None:
    deadlines, began = PausableDeadlines(), anyio.current_time()

    async def hold() -> None:
        await anyio.sleep(10)
        deadlines.pause(True)
        await anyio.sleep(1000)
        deadlines.pause(False)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hold)
        with pytest.raises(TimeoutError), bounded_wait("opening", lambda text: None, at_most=60, deadlines=deadlines):
            await anyio.sleep_forever()
    assert anyio.current_time() - began == pytest.approx(1060)


async def test_a_time_limit_belongs_to_the_run_around_it() -> None:
    deadlines, began = PausableDeadlines(), anyio.current_time()

    async def work() -> None:
        with time_limit(20) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught

    with deadlines.governing():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            deadlines.pause(True)
            await anyio.sleep(300)
            deadlines.pause(False)
    assert anyio.current_time() - began == pytest.approx(320)
    began = anyio.current_time()
    await work()
    assert anyio.current_time() - began == pytest.approx(20)


@settings(deadline=None)
@given(st.lists(st.none() | st.integers(), max_size=8))
def test_items_keep_their_order(items: list[int | None]) -> None:
    assert list(prepared_ahead(iter(items))) == items


def test_exactly_one_item_is_prepared_ahead() -> None:
    made = [threading.Event() for _ in range(4)]

    def making() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    items = prepared_ahead(making())
    assert not made[0].is_set(), "nothing is begun before it is asked for"
    assert next(items) == 0
    assert made[1].wait(10)
    assert not made[2].is_set()
    assert next(items) == 1
    assert made[2].wait(10)
    items.close()
    assert not made[3].is_set(), "whoever has gone has no more made for them"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("searchr1-ahead")]


def test_a_failure_is_raised_instead_of_its_item() -> None:
    def making() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    items = prepared_ahead(making())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
