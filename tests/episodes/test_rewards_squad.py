"""Scores against SQuAD's definition: edge cases worked out by hand, and an independent implementation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scoring.run import Independent, compare, pairs
from searchr1_async.episodes.rewards import cover_match, exact_match, f1, normalize_answer


@pytest.mark.parametrize(
    ("answer", "golden", "expected"),
    [
        # answer, golden answers, (exact match, F1, cover match); F1 = 2 * common words / words of both
        ("THE Beatles", ("Beatles",), (1, 1, 1)),
        ("a-ha", ("A-ha",), (1, 1, 1)),  # "aha": the hyphen is removed before articles
        ("a ha", ("A-ha",), (0, 0, 0)),  # "ha" and "aha"
        ("theatre", ("atre",), (0, 0, 0)),
        ("The The", ("The The",), (0, 0, 0)),  # articles alone are empty
        ("A", ("A",), (0, 0, 0)),
        ("!!!", ("!!!",), (0, 0, 0)),
        ("", ("Paris",), (0, 0, 0)),
        (None, ("Paris",), (0, 0, 0)),
        (" \t\n", ("Paris", ""), (0, 0, 0)),
        ("Paris", ("", "the"), (0, 0, 0)),  # an empty golden answer is never covered
        ("1,000", ("1000",), (1, 1, 1)),
        ("1.5", ("15",), (1, 1, 1)),  # SQuAD's rule, though wrong
        ("1 000", ("1000",), (0, 0, 0)),
        ("one thousand", ("1000",), (0, 0, 0)),
        ("July 4", ("4 July",), (0, 1, 0)),
        ("July 4, 1776", ("4 July",), (0, 2 * 2 / 5, 0)),
        ("b, c and a", ("a, b and c",), (0, 2 * 3 / 6, 0)),  # b c and | b and c: "a" is an article in both
        ("x, y and z", ("z, y and x",), (0, 1, 0)),
        ("new york new york", ("New York",), (0, 2 * 2 / 6, 1)),
        ("It was Mount Etna in Sicily", ("Etna",), (0, 2 * 1 / 7, 1)),
        ("party", ("art",), (0, 0, 0)),  # part of a word: FlashRAG's rule would cover it
        ("Paris, France", ("Rome", "Paris"), (0, 2 / 3, 1)),
        ("Am\u00e9lie", ("Ame\u0301lie",), (0, 0, 0)),  # composed and decomposed
        ("Amelie", ("Amélie",), (0, 0, 0)),
        ("Ｐａｒｉｓ", ("Paris",), (0, 0, 0)),  # full-width
        ("Straße", ("STRASSE",), (0, 0, 0)),  # lower case, no case folding
        ("STRAẞE", ("straße",), (1, 1, 1)),
        ("ISTANBUL", ("ıstanbul",), (0, 0, 0)),
        ("İstanbul", ("i\u0307stanbul",), (1, 1, 1)),  # İ in lower case is i with a dot above
        ("New\u00a0York", ("New York",), (1, 1, 1)),
        ("New\u200bYork", ("New York",), (0, 0, 0)),  # a zero-width space is not whitespace
        ("“Emma”", ("Emma",), (0, 0, 0)),  # curly quotes are not ASCII punctuation
        ("O’Brien", ("O'Brien",), (0, 0, 0)),
        ("1914–1918", ("1914-1918",), (0, 0, 0)),
        ("القاهرة", ("القاهرة",), (1, 1, 1)),
        ("\u202eParis\u202c", ("Paris",), (0, 0, 0)),
        ("🗼 Paris", ("Paris",), (0, 2 / 3, 1)),
        ("the_end", ("end",), (0, 0, 0)),  # "theend"
        ("東京 Tokyo", ("東京",), (0, 2 / 3, 1)),
        ("x " * 50_000 + "paris", ("Paris",), (0, 2 / 50_002, 1)),
    ],
)
def test_hostile_answers(answer: str | None, golden: tuple[str, ...], expected: tuple[float, float, float]) -> None:
    match, overlap, cover = expected
    assert exact_match(answer, golden) == match
    assert f1(answer, golden) == pytest.approx(overlap)
    assert cover_match(answer, golden) == cover


@given(st.text(max_size=20), st.lists(st.text(max_size=8), min_size=1, max_size=3).map(tuple))
def test_cover_match_lies_between_exact_match_and_flashrag_s(answer: str, golden: tuple[str, ...]) -> None:
    flashrag = any(normalize_answer(each) in normalize_answer(answer) for each in golden)
    assert exact_match(answer, golden) <= cover_match(answer, golden) <= float(flashrag)


GOLDEN = (
    ("Jesus Christ",), ("Mark Twain", "Twain, Mark", "Samuel Clemens"), ("4 July 1776", "July 4, 1776"), ("1,000", "1000"),
    ("the Beatles",), ("Straße des 17. Juni",), ("İstanbul", "Istanbul"), ("A-ha",), ("O'Brien", "O’Brien"), ("red, white and blue",),
    ("Æthelburh of Wilton",), ("São Paulo",), ("東京", "Tokyo"), ("القاهرة", "Cairo"), ("$1.5 million",), ("12",), ("The The",), ("ꙮ",),
)  # fmt: skip


def test_an_independent_implementation_agrees_on_thousands_of_pairs() -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    rng = random.Random(0)
    words = [word for golden in GOLDEN for text in golden for word in text.split()]
    made = (
        tuple(" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))) for _ in range(120)
    )
    rows = compare(pairs(iter([*GOLDEN, *made]), rng), Independent())
    assert len(rows) > 5_000
    assert [row for row in rows if not row["agrees"] and row["reason"] is None] == []
    assert sum(row["exact_match"] == 1 for row in rows) > 500
    assert sum(0 < row["f1"] < 1 for row in rows) > 500  # type: ignore[operator]
    for row in rows:
        if row["reason"]:  # deliberate: SQuAD accepts an empty answer
            assert (row["exact_match"], row["squad_exact_match"]) == (0, 1)
