from __future__ import annotations

import math
from dataclasses import replace

import polars as pl
import pytest

from searchr1_async.episodes.types import Episode, Passage, SearchCall, StopReason, Turn
from searchr1_async.records.scores import OUTCOMES, SCORE_SCHEMA, SCORES, score_frame
from tests.watch.builders import HOSTILE, answering_turn, episode, malformed_turn, question, searching_turn

SEEN, UNSEEN = searching_turn(), searching_turn("Nothing of the kind.")


def row(played: Episode) -> dict[str, object]:
    return score_frame("s", [(0, played)]).row(0, named=True)


def answering(answer: str | None, *turns: Turn, **changes: object) -> Episode:
    """An episode without reward parts, scored by its answer."""
    return replace(episode(turns=(*turns, answering_turn())), answer=answer, reward_parts={}, **changes)  # type: ignore[arg-type]


def test_a_row_has_what_was_asked_said_and_spent() -> None:
    played = episode(question("q7", "nq", hop=2), turns=(searching_turn(), malformed_turn(), answering_turn()))
    frame = score_frame("after RL", [(3, played)], step=12)
    assert frame.schema == SCORE_SCHEMA
    found = frame.row(0, named=True)
    assert (found["system"], found["step"], found["suite"], found["question_id"]) == ("after RL", 12, "nq", "q7")
    assert (found["sample"], found["hop"], found["failed"], found["answer"]) == (3, 2, False, "Paris")
    assert found["golden_answers"] == ["Paris", "City of Light"]
    assert (found["turns"], found["searches"], found["calls"], found["malformed_calls"]) == (3, 1, 2, 1)
    # Prompts as sent: 5 tokens; plus 3 sampled and 4 appended; plus 1 sampled.
    assert (found["prompt_tokens"], found["sampled_tokens"]) == (5 + 12 + 13, 3 + 1 + 2)
    assert (found["seconds"], found["sampling_seconds"], found["search_seconds"]) == (2.5, 2.0, 0.25)
    assert (found["answer_in_passage"], found["gold_recall"], found["judged"]) == (True, None, None)


def test_scores_are_the_rewards_parts_and_computed_where_one_is_missing_or_no_number() -> None:
    given = episode(parts={"cover": 0.5, "format": 0.25})
    assert [row(given)[name] for name in SCORES] == [1.0, 1.0, 0.5, 0.25]
    computed = row(answering("in the Paris area"))
    assert [computed[name] for name in SCORES] == [0.0, pytest.approx(0.5), 1.0, 1.0]
    broken = replace(answering("Paris"), reward_parts={"correct": math.nan, "f1": math.inf, "cover": 1.0})
    assert [row(broken)[name] for name in SCORES] == [1.0, 1.0, 1.0, 1.0]
    assert [row(answering(None))[name] for name in SCORES] == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("played", "outcome"),
    [
        (answering("Paris", SEEN), "right_seen"),
        (answering("Paris", UNSEEN), "right_unseen"),
        (answering("Paris"), "right_unseen"),
        (answering("Rome", SEEN), "reading_failed"),
        (answering("Rome", UNSEEN), "search_failed"),
        (answering("Rome", UNSEEN, SEEN), "reading_failed"),
        (answering("Rome"), "no_search"),
        (answering("Rome", malformed_turn()), "no_search"),
        (answering(None, SEEN), "no_answer"),
        (answering(None), "no_answer"),
        (replace(answering("Rome", SEEN), reward_parts={"correct": 0.0, "format": 0.0}), "no_answer"),
        (answering(None, SEEN, stop_reason=StopReason.TIME_LIMIT), "no_answer"),
        (episode(stop_reason=StopReason.FAILED, turns=(SEEN,)), "failed"),
    ],
)
def test_each_episode_went_wrong_in_one_place(played: Episode, outcome: str) -> None:
    assert row(played)["outcome"] == outcome
    assert outcome in OUTCOMES


def test_passages_given_with_the_question_are_a_search_and_were_shown() -> None:
    passages = (Passage("p1", "France", "Paris is large."), Passage("p2", "Italy", "Rome."))
    given = SearchCall(("What is the capital of q0?",), (passages,), None, 0.5)
    asked = question(gold_passages=["p2", "p9"])
    found = row(answering("Rome", question=asked, given=given))
    assert (found["searches"], found["calls"], found["search_seconds"]) == (1, 0, 0.5)
    assert (found["answer_in_passage"], found["outcome"], found["gold_recall"]) == (True, "reading_failed", 0.5)
    nothing = replace(given, results=((Passage("p2", "Italy", "Rome."),),))
    assert row(answering("Rome", given=nothing))["outcome"] == "search_failed"


@pytest.mark.parametrize(
    ("gold", "recall"),
    [(["p1"], 1.0), (("p1", "p2"), 0.5), ("p1", 1.0), (["p1", "p1"], 1.0), ([], None), (None, None), ({"p1": 1}, None)],
)
def test_recall_of_the_passages_that_a_question_names(gold: object, recall: float | None) -> None:
    assert row(answering("Rome", SEEN, question=question(gold_passages=gold)))["gold_recall"] == recall
    assert row(answering("Rome", question=question(gold_passages=["p1"])))["gold_recall"] == 0.0


def test_a_failed_episode_has_no_scores_and_still_a_row() -> None:
    found = row(episode(stop_reason=StopReason.FAILED, turns=()))
    assert [found[name] for name in SCORES] == [None] * 4
    assert (found["failed"], found["stop_reason"], found["turns"], found["prompt_tokens"]) == (True, "failed", 0, 0)


@pytest.mark.parametrize(("hop", "kept"), [(2, 2), ("3", 3), (2.0, 2), ("two", None), (math.nan, None), ([1], None)])
def test_a_hop_is_a_whole_number_or_nothing(hop: object, kept: int | None) -> None:
    assert row(episode(question(hop=hop)))["hop"] == kept


def test_hostile_text_is_kept_as_text_and_nothing_gives_an_empty_frame() -> None:
    asked = replace(question(HOSTILE, HOSTILE), question=HOSTILE, golden_answers=(HOSTILE,))
    frame = score_frame(HOSTILE, [(0, replace(episode(asked), answer=HOSTILE * 1000, reward_parts={}))])
    frame.write_ipc(None)
    assert frame["exact_match"].to_list() == [0.0]
    assert "\ud83d" not in frame["answer"][0]
    assert score_frame("s", []).schema == SCORE_SCHEMA


def test_rows_of_several_systems_concatenate() -> None:
    frames = [score_frame("a", [(0, episode())]), score_frame("b", [(0, episode())], 3), score_frame("c", [])]
    assert pl.concat(frames)["system"].to_list() == ["a", "b"]
