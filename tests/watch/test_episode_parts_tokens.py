from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.watch.episode_parts import (
    joined_logprobs,
    remember_tokenizer,
    token_pieces,
    tokenizer_of,
    turn_pieces,
)
from tests.watch.builders import episode
from tests.watch.pages import BytesTokenizer, spoken


@pytest.fixture(autouse=True)
def _nothing_remembered():
    yield
    remember_tokenizer(None)


@given(st.text(max_size=40))
def test_pieces_concatenate_to_the_text(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    tokens = list(text.encode())
    pieces = turn_pieces(BytesTokenizer(), tokens, text) if tokens else [""]
    assert pieces is not None
    assert "".join(pieces) == text
    if tokens:
        assert len(pieces) == len(tokens)


@given(st.binary(min_size=1, max_size=40))
def test_invalid_utf8_gives_its_decoding_or_none(tokens: bytes) -> None:
    tokenizer = BytesTokenizer()
    text = tokenizer.decode(list(tokens))
    pieces = turn_pieces(tokenizer, list(tokens), text)
    assert pieces is None or ("".join(pieces) == text and len(pieces) == len(tokens))


def test_tokens_of_one_character_are_joined() -> None:
    assert token_pieces(BytesTokenizer(), list("aé👩".encode())) == ["a", "é", "", "👩", "", "", ""]


def test_tokenizer_with_different_text_is_rejected() -> None:
    assert turn_pieces(BytesTokenizer(), [97, 98], "ab") == ["a", "b"]
    assert turn_pieces(BytesTokenizer(), [97, 98], "a b") is None
    assert turn_pieces(BytesTokenizer(), [97, 400], "ab") is None
    assert turn_pieces(None, [97], "a") is None


def test_joined_piece_sums_log_probabilities() -> None:
    assert joined_logprobs(["a", "é", "", "b"], [-1.0, -0.5, -0.25, math.nan]) == [
        ("a", -1.0),
        ("é", -0.75),
        ("b", None),
    ]


def test_episode_finds_its_tokenizer() -> None:
    class Other(BytesTokenizer):
        def decode(self, tokens: object) -> str:
            return "x"

    right, wrong = BytesTokenizer(), Other()
    remember_tokenizer(wrong)
    assert tokenizer_of(episode(turns=[spoken("hello")])) is None
    remember_tokenizer(right)
    assert tokenizer_of(episode(turns=[spoken("hello"), spoken("Answer: é")])) is right
    assert tokenizer_of(episode()) is None  # its ids and texts do not match
