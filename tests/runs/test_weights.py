from __future__ import annotations

import json
from pathlib import Path

import pytest

from searchr1_async.errors import RunFolderError
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.runs.weights import Weights, find_weights


def make_run(folder: Path, *, sampler_step: int | None = 4, kept: tuple[dict[str, object], ...] = ()) -> Path:
    """A run's folder after four steps."""
    folder.mkdir(parents=True)
    path = None if sampler_step is None else sampler_path(sampler_step)
    point = ResumePoint(
        *(4, 40, "tinker://state/4", "order", "base/model"),
        sampler_path=path,
        sampler_step=sampler_step,
        settings={"thinking": "low"},
    )
    point.save(folder)
    if kept:
        (folder / "checkpoints.json").write_text(json.dumps({"format": 1, "checkpoints": list(kept)}))
    return folder


def sampler_path(step: int) -> str:
    return f"tinker://run/sampler_weights/step-{step:06d}"


def kept_at(step: int, exact_match: float | None = None) -> dict[str, object]:
    questions = None if exact_match is None else 10
    return {"step": step, "sampler_path": sampler_path(step), "exact_match": exact_match, "questions": questions}


def test_no_checkpoint_is_the_base_model_at_step_zero(tmp_path: Path) -> None:
    assert find_weights(None) == Weights(None, 0, None, None, None)
    assert find_weights(None, service_folder=str(tmp_path)).service_folder == tmp_path


def test_a_tinker_path_gives_no_other_information(tmp_path: Path) -> None:
    assert find_weights(sampler_path(3)) == Weights(sampler_path(3), None, None, None, None)
    assert find_weights(sampler_path(3), service_folder=tmp_path).service_folder == tmp_path


def test_a_runs_last_weights_model_and_service_are_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found = find_weights(str(run))
    assert found == Weights(sampler_path(4), 4, "base/model", None, run, found.trained)
    assert found.trained is not None
    assert found.trained.episodes.thinking == "low"
    (run / "service").mkdir()
    assert find_weights(run).service_folder == run / "service"
    assert find_weights(run, service_folder=tmp_path / "other").service_folder == tmp_path / "other"


def test_steps_and_the_best_weights_are_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", kept=(kept_at(1, 0.3), kept_at(2, 0.5), kept_at(3, 0.4), kept_at(4)))
    found = find_weights(run, 3)
    assert (found.path, found.step, found.base_model, found.run) == (sampler_path(3), 3, "base/model", run)
    assert find_weights(run, "best").step == 2
    assert find_weights(run, "last").step == 4
    with pytest.raises(RunFolderError, match="no weights of step 7; kept: 1, 2, 3, 4"):
        find_weights(run, 7)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        find_weights(tmp_path / "nothing")
    fresh = make_run(tmp_path / "fresh", sampler_step=None)
    with pytest.raises(RunFolderError, match="has kept no weights yet"):
        find_weights(fresh)
    with pytest.raises(RunFolderError, match="kept: none"):
        find_weights(fresh, 1)
    unmeasured = make_run(tmp_path / "unmeasured", kept=(kept_at(4),))
    with pytest.raises(RunFolderError, match=r"has no best weights.*keep_best=True"):
        find_weights(unmeasured, "best")
