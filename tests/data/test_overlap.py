"""What training shares with an evaluation: found wherever it is, and templates are not mistaken for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.data.suites import NEAR, OVERLAP_SCHEMA, _NearIndex, _words, find_overlap
from searchr1_async.episodes.types import Question

FILLER = [
    f"{start} {subject} {number}?"
    for number, (start, subject) in enumerate(
        (start, subject)
        for start in ("who wrote the book", "what is the capital of the country", "when did they win the game of")
        for subject in ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
    )
]


def suite(texts: list[str], source: str) -> list[Question]:
    return [Question(f"q{number}", text, ("a",), source) for number, text in enumerate(texts)]


def kinds(training: str, asked: str) -> list[str]:
    found = find_overlap(suite([training, *FILLER], "train"), suite([asked], "nq"))
    assert found.schema == OVERLAP_SCHEMA
    assert found["training_id"].to_list() == ["q0"] * found.height
    return found["kind"].to_list()


@pytest.mark.parametrize(
    ("training", "asked", "expected"),
    [
        ("Who wrote Emma?", "who wrote  EMMA", ["same"]),
        ("Who wrote “Emma”?", 'Who wrote "Emma"?', ["same"]),
        ("Who directed Amélie?", "Who directed Ame\u0301lie?", ["same"]),
        ("Ｗｈｏ wrote Emma?", "Who wrote Emma?", ["same"]),
        ("Who wrote Em\u200bma?", "Who wrote Emma?", ["same"]),
        ("Where is the Straße?", "where is the STRASSE", ["same"]),
        ("What is C++?", "What is C?", ["near"]),
        ("who wrote the phantom of the opera music", "who wrote the music phantom of the opera", ["near"]),
        ("what is the highest point of the country whose capital is Windhoek",
         "what is the highest point of the country whose capital is Ottawa", []),
        ("Who wrote Emma?", "Who wrote Persuasion?", []),
        ("???", "!!!", []),
    ],
)  # fmt: skip
def test_pairs(training: str, asked: str, expected: list[str]) -> None:
    assert kinds(training, asked) == expected


def test_one_row_for_each_asked_question_with_its_closest() -> None:
    training = suite(["who wrote the music of the opera Carmen", "Who wrote the opera Carmen?", *FILLER], "recipe")
    asked = suite(["who wrote the opera carmen", "how tall is Mount Etna", FILLER[3]], "nq")
    assert find_overlap(iter(training), iter(asked)).rows() == [
        ("nq", "q0", "who wrote the opera carmen", "recipe", "q1", "Who wrote the opera Carmen?", "same"),
        ("nq", "q2", FILLER[3], "recipe", "q5", FILLER[3], "same"),
    ]
    assert find_overlap([], asked).is_empty()
    assert find_overlap(training, []).is_empty()


texts = st.lists(st.sampled_from("a b c d e f g h i j k l".split()), min_size=0, max_size=9).map(" ".join)  # noqa: SIM905


@given(st.lists(texts, max_size=12), st.lists(texts, max_size=12))
def test_the_index_finds_what_comparing_everything_finds(training: list[str], asked: list[str]) -> None:
    index = _NearIndex(training, asked)
    weights = {word: index._weights[number] for number, word in enumerate(_ranked([*training, *asked]))}

    def similarity(first: set[str], second: set[str]) -> float:
        both = sum(weights[word] for word in first | second)
        return sum(weights[word] for word in first & second) / both if both else 0.0

    for place, text in enumerate(asked):
        all_of_them = [similarity(_words(text), _words(other)) for other in training]
        closest = index.closest(place)
        if closest is None:
            assert max(all_of_them, default=0.0) < NEAR
        else:
            assert all_of_them[closest] == pytest.approx(max(all_of_them))
            assert all_of_them[closest] >= NEAR - 1e-8


def _ranked(texts: list[str]) -> list[str]:
    sets = [_words(text) for text in texts]
    words = {word for each in sets for word in each}
    return sorted(words, key=lambda word: (sum(word in each for each in sets), word))
