from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.local import scripted_model
from searchr1_async.local.scripted_model import PrefixCache

words = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda ids: np.array(ids, np.int32))


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(st.lists(st.tuples(words, words), max_size=12), words)
def test_hits_are_the_longest_prefix_that_was_run(runs: list[tuple[np.ndarray, np.ndarray]], asked: np.ndarray) -> None:
    cache = PrefixCache()
    for prompt, tokens in runs:
        cache.add(prompt, [tokens])
    run = [[*prompt.tolist(), *tokens.tolist()][:-1] for prompt, tokens in runs]
    longest = max((shared(text, asked.tolist()) for text in run), default=0)
    assert cache.hits(asked) == min(longest, len(asked) - 1)


def test_the_turns_of_an_episode_are_one_entry() -> None:
    cache, prompt = PrefixCache(), np.array([1, 2, 3], np.int32)
    for turn in range(4):
        assert cache.hits(prompt) == (0 if turn == 0 else len(prompt) - 2)
        cache.add(prompt, [np.array([4, 5], np.int32)])
        prompt = np.concatenate([prompt, np.array([4, 5, 6], np.int32)])
    assert len(cache._texts) == 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted_model, "MOST_TOKENS", 100)
    cache = PrefixCache()
    for number in range(200):
        cache.add(np.full(10, number, np.int32), [np.array([1], np.int32)])
        assert cache._tokens <= 110
        assert cache.hits(np.full(10, number, np.int32)) == 9
