"""A training process killed at any moment: nothing finished is lost, nothing is trained on twice or played for nothing."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tests.faults import scripted_world
from tests.faults.killing import KINDS, Plan, assert_epoch_is_whole, assert_same_outcome, train_through_kills

pytestmark = pytest.mark.anyio


async def survive(plan: Plan, folder: Path, kinds: tuple[str, ...], seed: int) -> None:
    async with scripted_world.service(folder) as service:

        async def one(name: str, kinds: tuple[str, ...]) -> None:
            ledger = await anyio.to_thread.run_sync(
                partial(train_through_kills, plan, folder / name, service, kinds, random.Random(seed))
            )
            assert tuple(ledger.kills) == kinds, "the run was over before it could be killed"
            assert_epoch_is_whole(plan, folder / name / "run")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, "killed", kinds)
            tasks.start_soon(one, "whole", ())
    assert_same_outcome(plan, folder / "killed" / "run", folder / "whole" / "run")


async def test_a_run_killed_while_it_records_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    # With staleness, later groups play meanwhile: some have finished, some are under way.
    await survive(Plan({"max_staleness": 1}, questions=24), tmp_path, ("recording",), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_a_run_killed_in_everything_that_it_does_ends_as_if_nothing_had_been(
    tmp_path: Path, max_staleness: int
) -> None:
    plan = Plan({"max_staleness": max_staleness, "refill_groups": 3})
    await survive(plan, tmp_path, KINDS, seed=max_staleness)
