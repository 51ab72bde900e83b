from __future__ import annotations

from pathlib import Path

from searchr1_async.billing import Billing, find_price
from searchr1_async.episodes.types import Question
from searchr1_async.learn.checkpoints import ResumePoint
from searchr1_async.run_folder import keep_questions, result_of, training_questions
from searchr1_async.usage import TokenUsage
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


def test_the_cost_in_a_folder_is_explained_by_the_table_only_where_its_price_made_it(tmp_path: Path) -> None:
    tokens = TokenUsage(1000, 200, 30, 400)
    dollars = Billing(find_price("Qwen/Qwen3-8B")).dollars(tokens)
    assert dollars is not None
    for spent, note in ((dollars, "Prefill $0.195"), (2 * dollars, "")):
        point = ResumePoint(1, 8, "tinker://state/1", "order", "Qwen/Qwen3-8B", tokens=tokens, dollars=spent)
        cost = result_of(tmp_path, point, "ended").cost
        assert cost is not None
        assert (cost.dollars, cost.tokens, cost.note[: len("Prefill $0.195")]) == (spent, tokens, note)
