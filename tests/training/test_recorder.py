from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.errors import CheckpointError, ServiceError, ungrouped
from searchr1_async.runs import folder as finished_groups
from searchr1_async.runs.control import RunControl
from searchr1_async.runs.folder import UnlearnedGroups
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.training import recorder as recorder_module
from searchr1_async.training.admission import Closed
from searchr1_async.training.learner import FinishedStep
from searchr1_async.training.recorder import Recorder, Step, UnlearnedWriter
from tests.watch.builders import group

pytestmark = pytest.mark.anyio


def full_disk(path: Path, content: bytes) -> None:
    raise OSError(28, "No space left on device")


async def test_a_group_that_is_rolled_out_again_at_once_is_kept(tmp_path: Path) -> None:
    """Its older group, of weights that were never saved, is forgotten in the same write."""
    UnlearnedGroups(tmp_path / "unlearned").write({1: group(corrects=(0.0, 0.0))})
    UnlearnedGroups(tmp_path / "unlearned").write({2: group()})
    writer, again = UnlearnedWriter(tmp_path), group(corrects=(1.0, 0.0))
    await writer.load()
    writer.forget({1, 2})
    writer.keep(1, again)
    async with writer.writing():
        pass
    assert await UnlearnedWriter(tmp_path).load() == {1: again}


async def test_a_full_disk_ends_the_run_that_has_a_group_to_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished_groups, "write_atomically", full_disk)
    writer = UnlearnedWriter(tmp_path)
    with pytest.raises(CheckpointError, match="No space left on device"):
        async with writer.writing():
            writer.keep(1, group())


async def test_a_last_write_that_fails_does_not_hide_why_the_run_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(finished_groups, "write_atomically", full_disk)
    writer = UnlearnedWriter(tmp_path)

    async def fail() -> None:
        with ungrouped():
            async with writer.writing():
                writer.keep(1, group())
                raise ServiceError("the service is gone")

    with pytest.raises(ServiceError, match="the service is gone"):
        await fail()
    assert "No space left on device" in caplog.text


def recorder_of(folder: Path, deleted: list[str], monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Of a run after step 1; ``deleted`` gets the paths that it deletes at the service."""

    async def delete(path: str) -> None:
        deleted.append(path)

    monkeypatch.setattr(recorder_module, "estimate", lambda shape, billing: SimpleNamespace(dollars_per_step=None))
    learning, shape = SimpleNamespace(advantage="centred"), SimpleNamespace(total_steps=9)
    job = SimpleNamespace(out_dir=folder, service=None, config=sr.TrainConfig(), learning=learning, shape=shape)
    service = SimpleNamespace(model_name="model", delete_checkpoint=delete)
    session: Any = SimpleNamespace(job=job, service=service, control=RunControl(), emit=lambda event: None)
    recorder = Recorder(session, {}, ResumePoint(1, 4, "tinker://run/weights/1", "order", "model"))
    recorder.begin()
    return recorder


async def record(recorder: Recorder, number: int, *, is_checkpoint: bool = False) -> None:
    """Records a step without groups, whose weights were saved for sampling."""

    async def finished() -> FinishedStep:
        return FinishedStep({}, f"tinker://run/weights/{number}", f"tinker://run/sampler_weights/{number}")

    training: Any = SimpleNamespace(finished=finished)
    admission: Any = SimpleNamespace(outcomes=lambda closed: (), next_place=4, open_after=lambda step: ())
    await recorder.record(Step(Closed(number, (), (), ()), training, {}, 0.0, 0.0, is_checkpoint, 1.0), admission)


async def test_the_state_of_the_resume_point_is_not_deleted_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step is in the list of checkpoints already, and no evaluation waits for it."""
    deleted: list[str] = []
    recorder, save = recorder_of(tmp_path, deleted, monkeypatch), ResumePoint.save
    async with anyio.create_task_group() as tasks:

        def save_slowly(point: ResumePoint, folder: Path) -> None:
            anyio.from_thread.run_sync(tasks.start_soon, recorder.delete_unwanted, [])
            time.sleep(0.1)
            save(point, folder)

        with monkeypatch.context() as slow:
            slow.setattr(ResumePoint, "save", save_slowly)
            await record(recorder, 2)
    assert {*deleted} == {"tinker://run/weights/1", "tinker://run/sampler_weights/2"}
    await record(recorder, 3, is_checkpoint=True)
    assert "tinker://run/weights/2" in deleted
    await record(recorder, 4)
    assert not {"tinker://run/weights/3", "tinker://run/sampler_weights/3"} & {*deleted}
