from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from searchr1_async.errors import CheckpointError, RunFolderError
from searchr1_async.learn.checkpoints import ResumePoint, write_atomically

POINT = ResumePoint(3, 36, "tinker://run/weights/step-000003", "abc", "model", settings={"seed": 2, "rate": 0.1})


def test_reads_back_what_was_saved(tmp_path: Path) -> None:
    assert ResumePoint.load(tmp_path) is None
    POINT.save(tmp_path)
    assert ResumePoint.load(tmp_path) == POINT
    replace(POINT, step=4).save(tmp_path)
    loaded = ResumePoint.load(tmp_path)
    assert loaded is not None
    assert loaded.step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_names_every_changed_setting() -> None:
    POINT.refuse_changes({"seed": 2, "rate": 0.1}, "abc")
    with pytest.raises(RunFolderError, match=r"rate: 0\.1 then, 0\.2 now.*questions"):
        POINT.refuse_changes({"seed": 2, "rate": 0.2}, "xyz")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', '{"format": 1, "step": 2}'])
def test_refuses_what_is_no_resume_point(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(RunFolderError):
        ResumePoint.load(tmp_path)


def test_a_full_disk_leaves_the_last_point_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    POINT.save(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*still whole"):
        replace(POINT, step=4).save(tmp_path)
    assert ResumePoint.load(tmp_path) == POINT
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_writes_whole_files(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
