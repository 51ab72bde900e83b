from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from searchr1_async.errors import CheckpointError
from searchr1_async.runs import finished_groups
from searchr1_async.runs.finished_groups import UnlearnedGroups
from searchr1_async.training.recorder import UnlearnedWriter
from tests.watch.builders import group

pytestmark = pytest.mark.anyio


async def test_a_disk_that_is_full_when_a_run_resumes_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between writing a place anew and dropping its older group: the resume rewrites the older part without it."""
    folder = tmp_path / "unlearned"
    UnlearnedGroups(folder).write([(1, group()), (2, group())])
    UnlearnedGroups(folder).write([(2, group())])

    def full_disk(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    job: Any = SimpleNamespace(out_dir=tmp_path)
    with monkeypatch.context() as full:
        full.setattr(finished_groups, "write_atomically", full_disk)
        with pytest.raises(CheckpointError, match="No space left on device"):
            await UnlearnedWriter(job).load()
    assert sorted(await UnlearnedWriter(job).load()) == [1, 2]


async def test_a_group_that_is_rolled_out_again_at_once_is_kept(tmp_path: Path) -> None:
    """Its older group, of weights that were never saved, is forgotten in the same write."""
    UnlearnedGroups(tmp_path / "unlearned").write([(1, group(corrects=(0.0, 0.0))), (2, group())])
    job: Any = SimpleNamespace(out_dir=tmp_path)
    writer, again = UnlearnedWriter(job), group(corrects=(1.0, 0.0))
    await writer.load()
    writer.forget({1, 2})
    writer.keep(1, again)
    async with writer.writing():
        pass
    assert await UnlearnedWriter(job).load() == {1: again}
