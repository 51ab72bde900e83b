from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from searchr1_async.errors import CheckpointError, RunFolderError
from searchr1_async.runs.resume import ResumePoint, write_atomically

SETTINGS = {"seed": 2, "learning": {"learning_rate": 4e-5, "beta1": 0.9, "loss_config": {}}, "warm_up": None}
POINT = ResumePoint(
    3, 36, "tinker://run/weights/step-000003", "abc", "model", open_places=(31, 34), seconds=1.5, settings=SETTINGS
)


def test_reads_back_what_was_saved(tmp_path: Path) -> None:
    assert ResumePoint.load(tmp_path) is None
    POINT.save(tmp_path)
    assert ResumePoint.load(tmp_path) == POINT
    replace(POINT, step=4).save(tmp_path)
    loaded = ResumePoint.load(tmp_path)
    assert loaded is not None
    assert loaded.step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "seed: 2 then, 3 now"),
        (
            {"learning": {"learning_rate": 1e-4, "beta1": 0.9, "loss_config": {}}},
            "learning.learning_rate: 4e-05 then, 0.0001 now",
        ),
        (
            {"learning": {"learning_rate": 4e-5, "beta1": 0.9, "loss_config": {"clip_low_threshold": 0.7}}},
            "learning.loss_config.clip_low_threshold: None then, 0.7 now",
        ),
        (
            {"learning": {"learning_rate": 4e-5, "loss_config": {}}, "warm_up": {"steps": 8}},
            "learning.beta1: 0.9 then, None now; warm_up: None then, {'steps': 8} now",
        ),
    ],
)
def test_names_the_changed_settings_and_only_those(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunFolderError, match=re.escape(f"other settings ({message})")):
        POINT.refuse_changes(SETTINGS | changes, "abc")


@pytest.mark.parametrize(("switched", "named"), [(True, "inflight"), (False, "snapshot")])
def test_a_run_that_was_begun_under_the_old_name_of_a_setting_goes_on(
    tmp_path: Path, switched: bool, named: str
) -> None:
    old = {"pipeline": {"max_staleness": 2, "switch_weights_in_flight": switched}}
    replace(POINT, settings=old).save(tmp_path)
    point = ResumePoint.load(tmp_path)
    assert point is not None
    point.refuse_changes({"pipeline": {"max_staleness": 2, "weights_in_flight": named}}, point.order_fingerprint)
    other = "snapshot" if named == "inflight" else "inflight"
    with pytest.raises(RunFolderError, match=f"pipeline.weights_in_flight: '{named}' then, '{other}' now"):
        point.refuse_changes({"pipeline": {"max_staleness": 2, "weights_in_flight": other}}, point.order_fingerprint)


def test_refuses_other_questions() -> None:
    POINT.refuse_changes(SETTINGS, "abc")
    with pytest.raises(RunFolderError, match="the questions or their order"):
        POINT.refuse_changes(SETTINGS, "xyz")


@pytest.mark.parametrize("written", [1, 3])
def test_says_that_another_version_wrote_it(tmp_path: Path, written: int) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"format": written, "step": 3, "position": 36}))
    with pytest.raises(RunFolderError, match=f"another version of this package .format {written}, not 2"):
        ResumePoint.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "x"}', '{"format": 2, "step": 2}'])
def test_refuses_what_is_no_resume_point(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(RunFolderError):
        ResumePoint.load(tmp_path)


def test_a_full_disk_leaves_the_last_point_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    POINT.save(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*What was written before is intact"):
        replace(POINT, step=4).save(tmp_path)
    assert ResumePoint.load(tmp_path) == POINT
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_writes_whole_files(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
