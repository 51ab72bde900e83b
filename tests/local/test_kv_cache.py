from __future__ import annotations

import gc

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.local.runner import DecodeCache, PrefixStore
from searchr1_async.local.transformer import Shape

SHAPE = Shape(layers=2, heads=2, kv_heads=1, head_size=2, hidden=4, vocabulary=10, context=1024)
TOKEN_BYTES = 2 * 2 * 1 * 2 * 4


class Owner:
    """A stand-in for a snapshot: hashable by identity, weakly referenceable."""


def kv_of(tokens: np.ndarray) -> torch.Tensor:
    """Keys and values unique to their prefix."""
    codes = [hash(tuple(tokens[: i + 1].tolist())) % 1_000_003 for i in range(len(tokens))]
    return torch.tensor(codes, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(2, 2, -1, 1, 2)


def store(capacity_tokens: int) -> PrefixStore:
    return PrefixStore(SHAPE, capacity_tokens * TOKEN_BYTES, torch.float32)


words = st.lists(st.integers(0, 2), min_size=1, max_size=10).map(lambda ids: np.array(ids, np.int32))


@given(st.lists(words, max_size=12), words)
def test_a_lookup_gives_the_longest_cached_prefix(known: list[np.ndarray], query: np.ndarray) -> None:
    prefixes = store(1000)
    for tokens in known:
        prefixes.insert(None, tokens, kv_of(tokens))

    length, pieces = prefixes.lookup(None, query)

    def shared(tokens: np.ndarray) -> int:
        return next(
            (i for i, (a, b) in enumerate(zip(tokens, query, strict=False)) if a != b), min(len(tokens), len(query))
        )

    assert length == max((shared(tokens) for tokens in known), default=0) == prefixes.match(None, query)
    if length:
        torch.testing.assert_close(torch.cat(pieces, dim=2), kv_of(query[:length]))
    distinct = {tuple(t[: i + 1].tolist()) for t in known for i in range(len(t))}
    assert prefixes.tokens == len(distinct)


@given(st.lists(words, max_size=30))
def test_capacity_is_never_exceeded(sequences: list[np.ndarray]) -> None:
    prefixes = store(12)
    for tokens in sequences:
        prefixes.insert(None, tokens, kv_of(tokens))
        assert prefixes.tokens <= 12
        length, pieces = prefixes.lookup(None, tokens)
        if length:
            torch.testing.assert_close(torch.cat(pieces, dim=2), kv_of(tokens[:length]))


def test_the_least_recently_used_is_evicted_first() -> None:
    prefixes = store(10)
    old, used, new = (np.array([first] * 4, np.int32) for first in (1, 2, 3))
    for tokens in (old, used):
        prefixes.insert(None, tokens, kv_of(tokens))
    prefixes.match(None, old)
    prefixes.match(None, used)

    prefixes.insert(None, new, kv_of(new))

    assert [prefixes.match(None, tokens) for tokens in (old, used, new)] == [0, 4, 4]


def test_snapshots_share_nothing_and_free_their_tree() -> None:
    prefixes, first, second = store(100), Owner(), Owner()
    tokens = np.array([1, 2, 3], np.int32)
    prefixes.insert(first, tokens, kv_of(tokens))

    assert prefixes.match(second, tokens) == prefixes.match(None, tokens) == 0
    assert prefixes.match(first, tokens) == prefixes.tokens == 3
    del first
    gc.collect()
    assert prefixes.tokens == 0


def test_slots_keep_their_contents_through_growth_removal_and_moves() -> None:
    cache = DecodeCache(SHAPE, torch.empty(0))
    contents = {}
    for number in range(1, 8):
        length = 20 * number
        tokens = np.arange(number, number + length, dtype=np.int32)
        slot = cache.open(length)
        cache.fill(slot, 0, kv_of(tokens))
        contents[slot] = tokens

    def check() -> None:
        assert set(cache.batch_order()) == set(contents)
        for slot, tokens in contents.items():
            torch.testing.assert_close(cache.read(slot), kv_of(tokens))

    check()
    for slot in list(contents)[::3]:
        cache.close(slot)
        del contents[slot]
        check()


def test_a_full_slot_moves_to_a_larger_pool() -> None:
    cache = DecodeCache(SHAPE, torch.empty(0))
    full, other = np.arange(128, dtype=np.int32), np.arange(5, dtype=np.int32)
    slot, small = cache.open(100), cache.open(5)
    cache.fill(slot, 0, kv_of(full))
    cache.fill(small, 0, kv_of(other))

    cache.make_room([slot, small])

    assert slot.pool.capacity == 256
    torch.testing.assert_close(cache.read(slot), kv_of(full))
    torch.testing.assert_close(cache.read(small), kv_of(other))
