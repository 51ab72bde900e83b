"""Run control, in virtual time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import anyio
import pytest

from searchr1_async.events import Event, RunPaused, RunResumed
from searchr1_async.runs.control import RunControl
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": True, "loop_factory": VirtualTimeLoop}


async def test_a_stop_cancels_only_the_innermost_block() -> None:
    control, done = RunControl(), []
    async with anyio.create_task_group() as tasks:

        async def work() -> None:
            with control.interruptible():
                with control.interruptible():
                    await anyio.sleep_forever()
                await anyio.sleep(30)
                done.append("tidied up")
            done.append("ended")

        tasks.start_soon(work)
        await anyio.sleep(1)
        control.request_stop()
        control.request_stop()
        await anyio.sleep(1)
        assert done == []
    assert done == ["tidied up", "ended"]


async def test_a_block_entered_after_a_stop_is_cancelled() -> None:
    control = RunControl()
    control.request_stop()
    with control.interruptible():
        await anyio.sleep_forever()
    assert control.stop_requested


async def test_a_pause_stops_the_clock_and_calls_every_hold() -> None:
    control, told, held = RunControl(), list[Event](), list[bool]()
    control.emit = told.append
    began = control.now()
    with control.holding(held.append):
        await anyio.sleep(10)
        control.pause()
        control.pause()
        with control.holding(held.append):
            await anyio.sleep(1000)
            assert control.now() - began == pytest.approx(10)
            control.resume()
        control.resume()
        await anyio.sleep(5)
    control.pause()
    assert control.now() - began == pytest.approx(15)
    assert held == [True, True, False, False]
    assert told == [RunPaused(), RunResumed(), RunPaused()]


async def test_a_pause_extends_a_deadline() -> None:
    control = RunControl()
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with anyio.create_task_group() as tasks:

        async def hold() -> None:
            for _ in range(3):
                await anyio.sleep(2)
                control.pause()
                await anyio.sleep(100)
                control.resume()

        tasks.start_soon(hold)
        await control.sleep_until(control.now() + 5)
        assert loop.time() - began == pytest.approx(2 * 100 + 5, abs=0.5)


async def test_waiters_continue_when_the_run_resumes() -> None:
    control, passed = RunControl(), []
    await control.wait_while_paused()
    control.pause()
    async with anyio.create_task_group() as tasks:

        async def next_step() -> None:
            await control.wait_while_paused()
            passed.append(control.is_paused)

        tasks.start_soon(next_step)
        await anyio.sleep(60)
        assert passed == []
        control.resume()
    assert passed == [False]


async def test_ask_waits_for_the_run_and_ends_with_it() -> None:
    control, told = RunControl(), []
    answers: Any = object()

    async def at_once(given: Any) -> Any:
        assert given is answers
        return "an answer"

    async def never(given: Any) -> Any:
        await anyio.sleep_forever()

    async def ask(put: Any) -> None:
        told.append(await control.answers.use(put))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, at_once)
        tasks.start_soon(ask, never)
        await anyio.sleep(1)
        assert told == []
        with control.answering(answers):
            await anyio.sleep(1)
            assert told == ["an answer"]
        await anyio.sleep(1)
        assert told == ["an answer", None], "what was under way is cut"
        tasks.start_soon(ask, at_once)
        await anyio.sleep(1)
        assert len(told) == 2
        control.end()
    assert told == ["an answer", None, None]
    assert await control.answers.use(at_once) is None


async def test_a_run_waits_for_the_users_of_its_service_unless_it_fails() -> None:
    service: Any = object()
    for fails in (False, True):
        control, told = RunControl(), []

        async def export(given: Any) -> str:
            await anyio.sleep(10)
            return "exported"

        async def use(own: RunControl = control, results: list[Any] = told) -> None:
            results.append(await own.service.use(export))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(use)
            began = anyio.current_time()
            with suppress(ZeroDivisionError):
                async with control.serving(service):
                    await anyio.sleep(1)
                    if fails:
                        _ = 1 / 0
            assert anyio.current_time() - began == pytest.approx(1 if fails else 10)
            tasks.start_soon(use)  # too late
            await anyio.sleep(1)
            assert told == [None if fails else "exported"]
            control.end()
        assert told[1:] == [None]


async def test_a_run_is_paused_while_any_reason_remains() -> None:
    """Paused by the user and by an outage: the run continues when both have ended."""
    for first in ("pause", "service"):
        control, held = RunControl(), list[bool]()
        with control.holding(held.append):
            control.pause()
            control.wait_for_service(True)
            control.wait_for_service(True)
            at = control.now()
            (control.resume if first == "pause" else lambda one=control: one.wait_for_service(False))()
            with anyio.move_on_after(0.02) as scope:
                await control.wait_while_paused()
            assert scope.cancelled_caught
            assert control.now() == at
            (control.resume if first == "service" else lambda one=control: one.wait_for_service(False))()
            await control.wait_while_paused()
        assert held == [True, False]
