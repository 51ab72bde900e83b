from __future__ import annotations

import pytest

from searchr1_async.rollout.elastic import SATURATED_SECONDS, WORTH_MEMBERS, ProcessLoad, wants_more_workers
from searchr1_async.rollout.worker_pool import DeathRecord

BUSY = ProcessLoad(SATURATED_SECONDS, WORTH_MEMBERS)


def test_a_saturated_process_wants_company_where_a_core_is_left() -> None:
    assert wants_more_workers([BUSY], cores=2, machine_load=1.3)
    assert wants_more_workers([BUSY, BUSY], cores=4, machine_load=2.5)


@pytest.mark.parametrize(
    ("processes", "cores", "machine_load"),
    [
        ([], 8, 0.0),
        ([BUSY], 1, 0.5),
        ([BUSY, BUSY], 2, 1.0),
        ([BUSY], 4, 4.0),
        ([ProcessLoad(SATURATED_SECONDS - 0.1, 1000)], 4, 1.0),
        ([ProcessLoad(60.0, WORTH_MEMBERS - 1)], 4, 1.0),
        ([BUSY, ProcessLoad(0.0, 0)], 4, 1.0),
    ],
    ids=["none", "one core", "all cores", "busy machine", "a moment", "few episodes", "one is free"],
)
def test_else_none_is_started(processes: list[ProcessLoad], cores: int, machine_load: float) -> None:
    assert not wants_more_workers(processes, cores=cores, machine_load=machine_load)


def test_deaths_are_too_many_within_a_time_only() -> None:
    record = DeathRecord(most=2, seconds=10.0)
    assert [record.is_too_many(now) for now in (0.0, 1.0, 2.0)] == [False, False, True]
    slow = DeathRecord(most=2, seconds=10.0)
    assert not any(slow.is_too_many(now) for now in range(0, 600, 6))
    assert slow.count == 100
