"""Validation of questions and passages; one-line reprs of episodes, turns and groups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import searchr1_async as sr
from searchr1_async.data.questions import load_questions
from searchr1_async.errors import CorpusError, QuestionsError
from searchr1_async.training.initial_weights import Demonstration


def test_a_text_is_one_answer_and_no_sequence_of_letters() -> None:
    given: Any = "Paris"  # as in ("Paris") with the comma missing
    assert sr.Question("1", "Which?", given).golden_answers == ("Paris",)
    assert Demonstration(sr.Question("1", "q?", ("a",)), given).searches == ("Paris",)
    assert Demonstration.of(sr.Question("1", "q?", ("a",), metadata={"search_queries": given})).searches == ("Paris",)


def test_what_can_be_taken_is_taken() -> None:
    given: Any = ["Paris", "Lutetia"]
    assert sr.Question("1", "Which?", given).golden_answers == ("Paris", "Lutetia")
    assert sr.Question("1", "Which?", np.array(given, dtype=object)).golden_answers == ("Paris", "Lutetia")  # type: ignore[arg-type]
    for own_id in (7, np.int64(7)):
        assert sr.Question(own_id, "Which?", ("Paris",)).id == "7"  # type: ignore[arg-type]
        assert sr.Passage(own_id, "t", "x").id == "7"  # type: ignore[arg-type]
    for title in (None, math.nan):
        assert sr.Passage("1", title, "x").title == ""  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"golden_answers": ("Paris", 5)}, r"number 2 is 5 \(int\)"),
        ({"golden_answers": (None,)}, "number 1 is None"),
        ({"golden_answers": {"Paris"}}, r"\(set\): give a tuple of strings"),
        ({"golden_answers": 5}, r"5 \(int\): give a tuple of strings"),
        ({"golden_answers": b"Paris"}, r"\(bytes\): give a tuple of strings"),
        ({"id": 7.5}, r"7.5 \(float\): give a string or an integer"),
        ({"id": True}, r"True \(bool\)"),
        ({"id": None}, "None"),
        ({"question": 5}, r"a question that is 5 \(int\)"),
        ({"data_source": None}, "a data_source that is None"),
        ({"metadata": None}, "metadata that is None"),
    ],
)
def test_a_question_of_something_else_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(QuestionsError, match=words):
        sr.Question(**{"id": "1", "question": "Which?", "golden_answers": ("Paris",), **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": None}, "a text that is None"),
        ({"text": math.nan}, "a text that is nan"),
        ({"title": 5}, r"a title that is 5 \(int\)"),
        ({"id": None}, "the id None"),
    ],
)
def test_a_passage_of_something_else_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        sr.Passage(**{"id": "1", "title": "t", "text": "x", **fields})


@pytest.mark.parametrize("field", ["id", "question", "golden_answers", "data_source"])
def test_a_lone_surrogate_is_refused_at_the_call(field: str) -> None:
    """Files, indexes and tokenizers cannot encode it."""
    broken: Any = ("half \ud83d",) if field == "golden_answers" else "half \ud83d"
    question = sr.Question(**{"id": "1", "question": "Which?", "golden_answers": ("Paris",), field: broken})
    with pytest.raises(QuestionsError, match="lone surrogate"):
        load_questions([question])


def test_an_episode_shows_itself_in_a_line() -> None:
    question = sr.Question("nq/1", "Which is the capital of France?", ("Paris",))
    call = sr.search.SearchCall(("capital of France",), ((sr.Passage("p", "France", "x" * 5000),),))
    searching = sr.Turn(tuple(range(3000)), (0.0,) * 3000, "<search>capital of France</search>", call=call)
    answering = sr.Turn((1, 2), (0.0, 0.0), "<answer>Paris</answer>")
    episode = sr.Episode(question, tuple(range(5000)), (searching, answering), sr.StopReason.ANSWER, "Paris", 1.0)
    assert repr(searching) == "<Turn '<search>capital of France</search>', 3,000 tokens, 1 passages>"
    assert repr(answering) == "<Turn '<answer>Paris</answer>', 2 tokens>"
    assert str(episode) == (
        "<Episode 'nq/1': 'Which is the capital of France?', 2 turns, 8,002 tokens, answer 'Paris', reward 1>"
    )
    assert len(episode.tokens) == 8002, "the tokens are still available"
    failed = sr.Episode(question, (1,), (), sr.StopReason.FAILED, error="the search is gone " * 50)
    group = sr.Group(question, (episode,) * 20, (failed,))
    assert repr(group).startswith("<Group 'nq/1': 'Which is the capital of France?', 20 episodes, rewards 1, 1,")
    assert repr(group).endswith(", …, 1 failed>")
    for shown in (repr(failed), repr(group), repr([episode])):
        assert len(shown) < 300
