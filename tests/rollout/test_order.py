from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.episodes.types import Question
from searchr1_async.errors import QuestionsError
from searchr1_async.rollout.order import QuestionOrder


def questions(count: int) -> list[Question]:
    return [Question(str(i), f"Question {i}?", ("yes",)) for i in range(count)]


@given(count=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(0, 5), epochs=st.integers(1, 3))
def test_every_epoch_holds_every_question_once(count: int, size: int, seed: int, epochs: int) -> None:
    order = QuestionOrder(questions(count), seed=seed, groups_per_batch=size)
    position, batches = 0, []
    for _ in range(order.steps(epochs)):
        batches.append(order.batch(position))
        position += len(batches[-1])
    assert position == epochs * count
    flat = [question.id for batch in batches for question in batch]
    for epoch in range(epochs):
        assert sorted(flat[epoch * count : (epoch + 1) * count], key=int) == [str(i) for i in range(count)]


def test_any_batch_is_known_from_its_position_alone() -> None:
    walked = QuestionOrder(questions(10), seed=3, groups_per_batch=4)
    for position in (0, 4, 8, 10, 14, 18):
        fresh = QuestionOrder(questions(10), seed=3, groups_per_batch=4)
        assert fresh.batch(position) == walked.batch(position)


def test_the_fingerprint_changes_with_questions_and_seed() -> None:
    prints = {
        QuestionOrder(questions(count), seed=seed, groups_per_batch=2).fingerprint
        for count, seed in ((5, 1), (6, 1), (5, 2))
    }
    assert len(prints) == 3


def test_refuses_no_questions_and_twin_ids() -> None:
    with pytest.raises(QuestionsError, match="no questions"):
        QuestionOrder([], seed=1, groups_per_batch=1)
    with pytest.raises(QuestionsError, match="'0'"):
        QuestionOrder([*questions(2), *questions(1)], seed=1, groups_per_batch=1)
