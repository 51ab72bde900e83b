from __future__ import annotations

from pathlib import Path

from searchr1_async.episodes.types import Question
from searchr1_async.run_folder import keep_questions, training_questions
from searchr1_async.watch.rows import storable
from tests.watch.builders import HOSTILE


def test_the_questions_that_a_run_keeps_come_back(tmp_path: Path) -> None:
    asked = [Question("1", "who?", ("me", "I"), "a", {"hop": 2}), Question("2", "é\x00?", ("x",), "b")]
    keep_questions(asked, tmp_path)
    kept = training_questions(tmp_path)
    assert kept == (Question("1", "who?", ("me", "I"), "a"), asked[1])
    keep_questions(asked[:1], tmp_path)
    assert training_questions(tmp_path) == kept, "written once"


def test_questions_with_lone_surrogates_are_kept(tmp_path: Path) -> None:
    keep_questions([Question(f"id{HOSTILE}", HOSTILE, (HOSTILE, "a"), HOSTILE, {"of": HOSTILE})], tmp_path)
    kept = storable(HOSTILE)
    assert training_questions(tmp_path) == (Question(f"id{kept}", kept, (kept, "a"), kept),)
