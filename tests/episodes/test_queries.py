"""clean_query."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.episodes.prompts import MAX_QUERY_CHARACTERS, clean_query

any_text = st.text(st.characters(exclude_categories=()), max_size=60)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("capital of Namibia", "capital of Namibia"),
        ("  capital\tof\n\nNamibia ", "capital of Namibia"),
        ("a\x00b\x1bc\x7fd", "a b c d"),
        ("Zürich 東京 مكة", "Zürich 東京 مكة"),
        ("no\u00a0break\u2028line", "no break line"),
        ("half \ud83d a pair", "half a pair"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("C++", "C++"),
        ("€", "€"),
        ("", None),
        (" \n\t ", None),
        ("?!... --", None),
        ("\ud800\udfff\ud800", None),
        ("\ufffe\uffff\ue000", None),
        ("\u200b\u200d", None),
    ],
)
def test_examples(text: str, cleaned: str | None) -> None:
    assert clean_query(text) == cleaned


def test_the_limit_counts_what_is_sent() -> None:
    assert clean_query("a" * MAX_QUERY_CHARACTERS) == "a" * MAX_QUERY_CHARACTERS
    assert clean_query("a" * (MAX_QUERY_CHARACTERS + 1)) is None
    assert clean_query("a" + " " * MAX_QUERY_CHARACTERS + "b") == "a b"
    assert clean_query("a " * 10_000_000) is None


@given(any_text)
def test_what_comes_out_can_be_sent_and_stays_as_it_is(text: str) -> None:
    cleaned = clean_query(text)
    if cleaned is not None:
        assert cleaned.encode("utf-8")
        assert clean_query(cleaned) == cleaned
        assert not any(unicodedata.category(character) == "Cc" for character in cleaned)
        assert 0 < len(cleaned) <= MAX_QUERY_CHARACTERS


@given(any_text, st.sampled_from("aé7語"))
def test_one_letter_is_enough(text: str, letter: str) -> None:
    cleaned = clean_query(text + letter)
    assert cleaned is not None
    assert cleaned.endswith(letter)
