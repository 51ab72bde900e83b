"""Verdicts on disk: those of one judge are never among another's, whenever it is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.judging import judge_digest, lay_verdicts
from searchr1_async.evaluation.store import JUDGEMENTS_NAME

ONE, OTHER = Judge("one").describe(), Judge("other").describe()


def begin(folder: Path, before: dict[str, Any] | None, now: dict[str, Any] | None, killed: int = 9) -> None:
    """A session's beginning, killed behind so many steps."""
    steps = [
        lambda: lay_verdicts(folder, before, now),
        lambda: (folder / "judge").write_text("none" if now is None else now["model"]),
        lambda: lay_verdicts(folder, now, now),
    ]
    for step in steps[:killed]:
        step()


def named(folder: Path) -> dict[str, Any] | None:
    return {"none": None, "one": ONE, "other": OTHER}[(folder / "judge").read_text()]


@pytest.mark.parametrize("killed", range(4))
@pytest.mark.parametrize("then", [OTHER, None])
def test_another_judge_begins_anew_and_the_first_finds_its_own_again(
    tmp_path: Path, killed: int, then: dict[str, Any] | None
) -> None:
    current = tmp_path / JUDGEMENTS_NAME
    begin(tmp_path, None, ONE)
    current.write_text("of one")
    begin(tmp_path, ONE, then, killed)
    begin(tmp_path, named(tmp_path), then)
    assert not current.exists()
    if then is not None:
        current.write_text("of the other")
    begin(tmp_path, then, ONE, killed)
    begin(tmp_path, named(tmp_path), ONE)
    assert current.read_text() == "of one"
    begin(tmp_path, ONE, then)
    assert current.exists() == (then is not None)
    assert then is None or current.read_text() == "of the other"


def test_a_judge_is_the_same_whatever_its_patience() -> None:
    patient = Judge("one", deadline=7, at_once=3).describe()
    assert judge_digest(patient) == judge_digest(ONE)
    assert len({judge_digest(each) for each in (ONE, OTHER, Judge("one", max_tokens=9).describe())}) == 3
