from __future__ import annotations

from pathlib import Path

import pytest

from searchr1_async.episodes.rendering import RememberingTokenizer
from searchr1_async.testing import make_tiny_tokenizer


class Counting:
    """Counts encoded texts."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer
        self.encoded = 0

    def encode(self, *arguments: object, **options: object) -> list[int]:
        self.encoded += 1
        return self._tokenizer.encode(*arguments, **options)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    return make_tiny_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


def test_encodes_as_its_tokenizer_does_and_each_text_once(tokenizer: object) -> None:
    counting = Counting(tokenizer)
    remembering = RememberingTokenizer(counting)
    for text in ("", "one text", "another\n", "one text"):
        assert remembering.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    assert counting.encoded == 3
    remembering.encode("one text")
    assert counting.encoded == 4, "special tokens bypass the cache"


def test_what_it_gives_away_can_be_changed(tokenizer: object) -> None:
    remembering = RememberingTokenizer(tokenizer)
    first = remembering.encode("one text", add_special_tokens=False)
    before = list(first)
    first.append(7)
    assert remembering.encode("one text", add_special_tokens=False) == before


def test_is_the_tokenizer_in_everything_else(tokenizer: object) -> None:
    remembering = RememberingTokenizer(tokenizer)
    assert remembering.eos_token_id == tokenizer.eos_token_id  # type: ignore[attr-defined]
    assert len(remembering) == len(tokenizer)  # type: ignore[arg-type]
    assert remembering("one text")["input_ids"] == tokenizer("one text")["input_ids"]  # type: ignore[operator]
