"""Waits in virtual time: bounded, and told once."""

from __future__ import annotations

import re
from typing import Any

import anyio
import pytest

from searchr1_async.boundary.waits import PausableDeadlines, bounded_wait, pause, time_limit
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": True, "loop_factory": VirtualTimeLoop}


async def test_a_short_wait_is_not_told() -> None:
    told: list[str] = []
    with bounded_wait("the service is starting", told.append, at_most=60):
        await anyio.sleep(4.9)
    await pause(4.9, "the service asked for it", told.append)
    await anyio.sleep(60)
    assert told == []


async def test_a_long_wait_is_told_once_while_it_lasts() -> None:
    told: list[str] = []
    began = anyio.current_time()
    with bounded_wait("the service is starting", told.append, at_most=60):
        await anyio.sleep(5.1)
        assert len(told) == 1
        await anyio.sleep(30)
    assert len(told) == 1
    assert anyio.current_time() - began == pytest.approx(35.1)
    assert re.fullmatch(r"the service is starting: waiting for at most 55 s more, until (\S+ )?\d\d:\d\d:\d\d", told[0])


async def test_a_wait_ends_at_its_bound() -> None:
    told: list[str] = []
    began = anyio.current_time()
    with pytest.raises(TimeoutError), bounded_wait("the service does not answer", told.append, at_most=60):
        await anyio.sleep_forever()
    assert anyio.current_time() - began == pytest.approx(60)


async def test_a_pause_is_told_at_its_beginning_with_the_day_where_it_is_another() -> None:
    told: list[str] = []
    await pause(3 * 86_400, "the service asked for it", told.append)
    (sentence,) = told
    assert re.fullmatch(
        r"the service asked for it: waiting for at most 259,200 s more, until \d{4}-\d\d-\d\d .*", sentence
    )


async def test_time_that_a_run_is_held_counts_for_no_bound() -> None:
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
