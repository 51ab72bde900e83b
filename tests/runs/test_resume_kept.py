"""Kept checkpoints, in memory and in a file that survives kills."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.errors import RunFolderError
from searchr1_async.runs.resume import (
    CheckpointList,
    KeptCheckpoint,
    ResumePoint,
    best_checkpoint,
    best_of,
    kept_checkpoints,
)

POINT = ResumePoint(6, 36, "tinker://run/weights/step-000006", "abc", "model")


def path_of(step: int, run: str = "run") -> str:
    return f"tinker://{run}/sampler_weights/step-{step:06d}"


def test_measured_weights_go_and_the_others_stay(tmp_path: Path) -> None:
    kept = CheckpointList(tmp_path)
    for step in range(1, 5):
        kept.add(step, path_of(step), for_good=step == 4)
    assert kept.take_unwanted(waiting=[1, 2, 3]) == ()
    kept.measured(2, 0.5, 10)
    kept.measured(4, 0.4, 10)
    (gone,) = kept.take_unwanted(waiting=[1, 3])
    assert gone == KeptCheckpoint(2, path_of(2), 0.5, 10, for_good=False)
    replace(POINT, sampler_path=path_of(4), sampler_step=4).save(tmp_path)
    assert [(one.step, one.exact_match) for one in kept_checkpoints(tmp_path)] == [(1, None), (3, None), (4, 0.4)]
    assert CheckpointList(tmp_path).checkpoints == kept.checkpoints


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, math.nan]), st.booleans()), max_size=8))
def test_the_best_so_far_stays_whatever_comes(scores: list[tuple[float, bool]]) -> None:
    """The earliest if tied; permanent checkpoints are never deleted."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        kept = CheckpointList(Path(scratch), keep_best=True)
        there: set[str] = set()
        for step, (score, for_good) in enumerate(scores, start=1):
            kept.add(step, path_of(step), for_good=for_good)
            there.add(path_of(step))
            kept.measured(step, score, 10)
            there -= {one.sampler_path for one in kept.take_unwanted()}
        finite = [(score, -step) for step, (score, _) in enumerate(scores, start=1) if not math.isnan(score)]
        best = {-max(finite)[1]} if finite else set()
        asked = {step for step, (_, for_good) in enumerate(scores, start=1) if for_good}
        assert there == {path_of(step) for step in best | asked}
        assert {one.sampler_path for one in kept.checkpoints} == there
        found = best_checkpoint(Path(scratch))
        assert (found.step if found else None) == next(iter(best), None)


def test_steps_that_a_resume_makes_anew_are_not_there_and_are_deleted(tmp_path: Path) -> None:
    kept = CheckpointList(tmp_path)
    kept.add(6, path_of(6), for_good=False)
    kept.add(7, path_of(7), for_good=True)  # killed before its resume point was written
    POINT.save(tmp_path)
    assert [one.step for one in kept_checkpoints(tmp_path)] == [6]
    again = CheckpointList(tmp_path)
    assert [one.sampler_path for one in again.take_unwanted(waiting=[6])] == [path_of(7)]
    again.add(7, path_of(7, "another"), for_good=False)
    assert again.take_unwanted(waiting=[6, 7]) == ()
    again.add(7, path_of(7, "third"), for_good=True)
    assert [one.sampler_path for one in again.take_unwanted(waiting=[6, 7])] == [path_of(7, "another")]


def test_a_score_that_comes_before_its_weights_are_kept_is_not_lost(tmp_path: Path) -> None:
    kept = CheckpointList(tmp_path)
    kept.measured(5, 0.75, 12)
    kept.add(5, path_of(5), for_good=True)
    assert best_of(kept.checkpoints) == KeptCheckpoint(5, path_of(5), 0.75, 12)


def test_a_folder_of_an_earlier_version_has_what_its_resume_point_knows(tmp_path: Path) -> None:
    assert kept_checkpoints(tmp_path) == ()
    POINT.save(tmp_path)
    assert kept_checkpoints(tmp_path) == ()
    replace(POINT, sampler_path=path_of(4), sampler_step=4).save(tmp_path)
    assert kept_checkpoints(tmp_path) == (KeptCheckpoint(4, path_of(4)),)
    assert best_checkpoint(tmp_path) is None


def test_weights_are_kept_with_their_state(tmp_path: Path) -> None:
    kept, state = CheckpointList(tmp_path), "tinker://run/weights/step-000006"
    kept.add(5, path_of(5), for_good=False, state_path="tinker://run/weights/step-000005")
    assert kept.holds_state("tinker://run/weights/step-000005")
    assert not kept.holds_state(state)
    kept.measured(5, 0.5, 10)
    (gone,) = kept.take_unwanted()
    assert gone.paths == (path_of(5), "tinker://run/weights/step-000005")
    assert not kept.holds_state("tinker://run/weights/step-000005")


def test_a_step_of_an_earlier_version_has_the_state_of_the_resume_point_alone(tmp_path: Path) -> None:
    rows = [{"step": step, "sampler_path": path_of(step)} for step in (3, 6)]
    (tmp_path / "checkpoints.json").write_text(json.dumps({"format": 1, "checkpoints": rows}))
    POINT.save(tmp_path)
    assert [one.state_path for one in kept_checkpoints(tmp_path)] == [None, POINT.state_path]
    again = CheckpointList(tmp_path)
    assert again.holds_state(POINT.state_path), "so a resumed run does not delete it"
    assert again.take_unwanted() == (), "and nothing counts as lost"


def test_another_attempt_in_the_folder_is_forgotten(tmp_path: Path) -> None:
    kept = CheckpointList(tmp_path)
    kept.add(3, path_of(3), for_good=True)
    assert [one.step for one in kept.clear()] == [3]
    assert kept.checkpoints == kept_checkpoints(tmp_path) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is damaged.*Delete it"),
        (json.dumps({"format": 1, "checkpoints": [{"step": 1}]}).encode(), "is damaged.*Delete it"),
        (json.dumps({"format": 2, "checkpoints": []}).encode(), "another version"),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error_with_a_remedy(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "checkpoints.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=message):
        kept_checkpoints(tmp_path)
