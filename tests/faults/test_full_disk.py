"""A disk that really fills up under the service's checkpoints."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.runs.resume import ResumePoint
from tests import tiny_world

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

MOUNT = shutil.which("mount")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "run" / "service"
    folder.mkdir(parents=True)
    mounted = MOUNT and subprocess.run(
        [MOUNT, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no small file system can be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


async def test_a_full_disk_under_the_checkpoints_is_said_and_with_room_the_run_goes_on(
    small_disk: Path, tmp_path: Path
) -> None:
    def start() -> sr.Run:
        # Every step is kept for good, so a few of them fill the disk.
        changes: dict[str, Any] = {"group_size": 2, "groups_per_batch": 2, "minibatches": 1, "checkpoint_every": 1}
        return sr.train(
            tiny_world.make_questions()[0],
            tiny_world.make_search(tmp_path / "index"),
            out_dir=tmp_path / "run",
            resume=True,
            **tiny_world.given(
                sr.TrainConfig, tiny_world.SETTINGS | changes, model=str(tiny_world.model_folder()), steps=5
            ),
        )

    with pytest.raises(sr.errors.CheckpointError, match=r"(?i)space|disk"):
        await start()
    point = ResumePoint.load(tmp_path / "run")
    assert point is not None
    assert 0 <= point.step < 5
    assert tiny_world.service_processes() == []
    assert MOUNT
    await anyio.run_process([MOUNT, "-o", "remount,size=64m", str(small_disk)])
    run = start()
    result = await run
    assert (result.steps, result.reason) == (5, "finished")
    assert run.metrics["step"].to_list() == list(range(1, 6))
