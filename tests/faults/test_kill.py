"""A training process killed at any moment: nothing finished is lost, nothing is trained on twice or played for nothing."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from searchr1_async.local import LocalService
from searchr1_async.records.run_records import RunRecords
from tests.faults import scripted_world
from tests.faults.killing import KINDS, Plan, assert_epoch_is_whole, assert_same_outcome, train_through_kills

pytestmark = pytest.mark.anyio


async def survive(service: LocalService, plan: Plan, folder: Path, kinds: tuple[str, ...], seed: int) -> None:
    ledger = await anyio.to_thread.run_sync(
        partial(train_through_kills, plan, folder, service, kinds, random.Random(seed))
    )
    assert tuple(ledger.kills) == kinds, "the run was over before it could be killed"
    assert_epoch_is_whole(plan, folder / "run")


async def test_a_run_killed_while_it_records_trains_its_epoch_once(tmp_path: Path) -> None:
    # With staleness, later groups play meanwhile: some have finished, some are under way.
    async with scripted_world.service(tmp_path) as service:
        await survive(service, Plan({"max_staleness": 1}, questions=24), tmp_path / "killed", ("recording",), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("weights_in_flight", ["snapshot", "inflight"])
async def test_a_run_killed_while_it_learns_from_recorded_sequences_trains_its_epoch_once(
    tmp_path: Path, weights_in_flight: str
) -> None:
    """What is left of the session before is learned with another loss: never an error, and nothing is played twice."""
    settings = {"max_staleness": 2, "loss": "stable_reinforce", "weights_in_flight": weights_in_flight}
    async with scripted_world.service(tmp_path) as service:
        await survive(service, Plan(settings, questions=36), tmp_path / "killed", ("sampling", "learning"), seed=3)
    metrics = RunRecords(tmp_path / "killed" / "run").metrics()
    assert 0 < metrics["optim/fallback_datums"].sum() < metrics["optim/datums"].sum()


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_a_run_killed_in_everything_that_it_does_ends_as_if_nothing_had_been(
    tmp_path: Path, max_staleness: int
) -> None:
    plan = Plan({"max_staleness": max_staleness, "refill_groups": 3})
    async with scripted_world.service(tmp_path) as service, anyio.create_task_group() as tasks:
        tasks.start_soon(survive, service, plan, tmp_path / "killed", KINDS, max_staleness)
        tasks.start_soon(survive, service, plan, tmp_path / "whole", (), 0)
    assert_same_outcome(plan, tmp_path / "killed" / "run", tmp_path / "whole" / "run")
