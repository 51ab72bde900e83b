from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import searchr1_async as sr
from searchr1_async.billing import Billing, TokenUsage
from searchr1_async.episodes.table import storable
from searchr1_async.episodes.types import Question
from searchr1_async.models import find_price
from searchr1_async.runs.folder import keep_questions, result_of, training_questions, work_in
from searchr1_async.runs.resume import ResumePoint
from tests import tiny_world
from tests.watch.builders import HOSTILE


def test_saved_questions_round_trip(tmp_path: Path) -> None:
    asked = [Question("1", "who?", ("me", "I"), "a", {"hop": 2}), Question("2", "é\x00?", ("x",), "b")]
    keep_questions(asked, tmp_path)
    kept = training_questions(tmp_path)
    assert kept == (Question("1", "who?", ("me", "I"), "a"), asked[1])
    keep_questions(asked[:1], tmp_path)
    assert training_questions(tmp_path) == kept, "written once"


def test_questions_with_lone_surrogates_are_saved(tmp_path: Path) -> None:
    keep_questions([Question(f"id{HOSTILE}", HOSTILE, (HOSTILE, "a"), HOSTILE, {"of": HOSTILE})], tmp_path)
    kept = storable(HOSTILE)
    assert training_questions(tmp_path) == (Question(f"id{kept}", kept, (kept, "a"), kept),)


def test_a_recorded_cost_cites_the_price_table_only_if_it_matches(tmp_path: Path) -> None:
    tokens = TokenUsage(1000, 200, 30, 400)
    dollars = Billing(find_price("Qwen/Qwen3-8B")).dollars(tokens)
    assert dollars is not None
    for spent, note in ((dollars, "Prefill $0.195"), (2 * dollars, "")):
        point = ResumePoint(1, 8, "tinker://state/1", "order", "Qwen/Qwen3-8B", tokens=tokens, dollars=spent)
        cost = result_of(tmp_path, point, "ended").cost
        assert cost is not None
        assert (cost.dollars, cost.tokens, cost.note[: len("Prefill $0.195")]) == (spent, tokens, note)


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (lambda folder: None, ""),
        (lambda folder: (folder / "events.jsonl").touch(), ""),
        (lambda folder: (folder / "unlearned").mkdir(), ""),
        (lambda folder: [(folder / "unlearned").mkdir(), (folder / "unlearned" / "groups").touch()], "finished groups"),
        (
            lambda folder: [
                (folder / "evaluations").mkdir(),
                (folder / "evaluations" / "0000-untrained.parquet").touch(),
            ],
            "evaluations",
        ),
    ],
)
def test_work_in_a_run_without_steps(prepare: Callable[[Path], object], told: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    point = ResumePoint(0, 0, "tinker://run/weights/start", "order", "model")
    assert work_in(tmp_path, point) == (f"0 steps, but {told}" if told else "")
    assert "kept weights" in work_in(tmp_path, ResumePoint(0, 0, "state", "order", "model", sampler_path="weights"))
    assert work_in(tmp_path, ResumePoint(3, 0, "state", "order", "model")) == "3 steps"


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["questions.parquet", "tokenizer", "search.json", "manifest.json"])
async def test_foreign_files_are_not_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    questions = tiny_world.make_questions()[0][:2]
    with pytest.raises(sr.errors.RunFolderError, match="choose another out_dir"):
        sr.train(questions, tiny_world.make_search(tmp_path / "index"), out_dir=tmp_path / "mine", progress=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]
    assert (tmp_path / "mine" / name).read_text() == "mine"
