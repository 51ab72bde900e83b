from __future__ import annotations

import asyncio

import anyio
import pytest

from searchr1_async.rollout.event_loop import LoopTurns

pytestmark = pytest.mark.anyio


async def test_a_crowd_is_spread_over_turns_of_the_loop_in_order() -> None:
    turns, iterations, seen = LoopTurns(3), 0, []
    loop = asyncio.get_running_loop()
    is_over = False

    def count() -> None:
        nonlocal iterations
        iterations += 1
        if not is_over:
            loop.call_soon(count)

    async def work(number: int) -> None:
        await turns.turn()
        seen.append((iterations, number))

    loop.call_soon(count)
    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(work, number)
    is_over = True
    await asyncio.sleep(0)
    assert [number for _, number in seen] == list(range(20))
    in_a_turn = [sum(turn == iteration for turn, _ in seen) for iteration in {turn for turn, _ in seen}]
    assert max(in_a_turn) <= 3


async def test_a_lone_piece_does_not_wait() -> None:
    turns = LoopTurns(1)
    coroutine = turns.turn()
    with pytest.raises(StopIteration):
        coroutine.send(None)


async def test_a_cancelled_piece_leaves_its_turn_to_the_next() -> None:
    turns, done = LoopTurns(1), []

    async def work(number: int) -> None:
        await turns.turn()
        done.append(number)

    async with anyio.create_task_group() as tasks:
        await turns.turn()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as cancelled:
                for number in range(3):
                    cancelled.start_soon(work, number)
                scope.cancel()
        tasks.start_soon(work, 9)
    assert done[-1] == 9, "it is not blocked"
