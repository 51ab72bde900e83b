"""The embedded service is killed under a run: the run says so at once, and goes on from its last finished step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.events import Event, MinibatchSubmitted
from searchr1_async.runs.resume import ResumePoint
from tests import tiny_world

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


async def test_a_run_whose_service_dies_ends_with_its_cause_and_can_go_on(tmp_path: Path) -> None:
    def kill_in_the_second_step(event: Event) -> None:
        if isinstance(event, MinibatchSubmitted) and event.step == 2:
            for pid in tiny_world.service_processes(os.getpid()):
                os.kill(pid, signal.SIGKILL)

    def start(**changes: object) -> sr.Run:
        small = {"group_size": 4, "groups_per_batch": 4, "minibatches": 2, "drop_constant_groups": False}
        return sr.train(
            tiny_world.make_questions()[0],
            tiny_world.make_search(tmp_path / "index"),
            out_dir=tmp_path / "run",
            resume=True,
            **tiny_world.given(
                sr.TrainConfig, tiny_world.SETTINGS | small | changes, model=str(tiny_world.model_folder()), steps=3
            ),
        )

    with anyio.fail_after(120), pytest.raises(sr.errors.ServiceError, match="exited unexpectedly"):
        await start(on_event=kill_in_the_second_step)
    point = ResumePoint.load(tmp_path / "run")
    assert point is not None
    assert point.step == 1
    assert (await start()).steps == 3
