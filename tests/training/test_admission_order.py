from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.episodes.types import Question
from searchr1_async.training.admission import QuestionOrder


def questions(count: int) -> list[Question]:
    return [Question(str(i), f"Question {i}?", ("yes",)) for i in range(count)]


@given(count=st.integers(1, 40), seed=st.integers(0, 5), epochs=st.integers(1, 3))
def test_every_epoch_holds_every_question_once(count: int, seed: int, epochs: int) -> None:
    order = QuestionOrder(questions(count), seed=seed)
    assert len(order) == count
    for epoch in range(epochs):
        ids = [order.question(epoch * count + offset).id for offset in range(count)]
        assert sorted(ids, key=int) == [str(i) for i in range(count)]


def test_epochs_are_shuffled_apart() -> None:
    order = QuestionOrder(questions(30), seed=3)
    assert [order.question(p).id for p in range(30)] != [order.question(30 + p).id for p in range(30)]


def test_any_place_is_known_by_itself() -> None:
    walked = QuestionOrder(questions(10), seed=3)
    for place in (29, 0, 4, 8, 10, 14, 18):
        assert QuestionOrder(questions(10), seed=3).question(place) == walked.question(place)


def test_the_fingerprint_changes_with_questions_and_seed() -> None:
    prints = {QuestionOrder(questions(count), seed=seed).fingerprint for count, seed in ((5, 1), (6, 1), (5, 2))}
    assert len(prints) == 3
