from __future__ import annotations

import gc
import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from searchr1_async.local import kv_cache
from searchr1_async.local.kv_cache import KvCache, Slot
from searchr1_async.local.transformer import Shape

SHAPE = Shape(layers=2, heads=2, kv_heads=1, head_size=2, hidden=4, vocabulary=10, context=1024, middle=4)
TOKEN_BYTES = 2 * 2 * 1 * 2 * 4


class Owner:
    """A stand-in for a snapshot: hashable by identity, weakly referenceable."""


def kv_of(tokens: np.ndarray) -> torch.Tensor:
    """Keys and values unique to their prefix."""
    codes = [hash(tuple(tokens[: i + 1].tolist())) % 1_000_003 for i in range(len(tokens))]
    return torch.tensor(codes, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(2, 2, -1, 1, 2)


def cache_of(capacity_tokens: int) -> KvCache:
    return KvCache(SHAPE, torch.empty(0), capacity_tokens * TOKEN_BYTES)


def run(cache: KvCache, owner: Owner | None, tokens: np.ndarray) -> Slot:
    slot = cache.open(owner, tokens)
    cache.fill(slot, 0, kv_of(tokens))
    return slot


def keep(cache: KvCache, owner: Owner | None, tokens: np.ndarray) -> Slot:
    """A sequence that has run and ended."""
    slot = run(cache, owner, tokens)
    cache.park(slot, tokens)
    return slot


words = st.lists(st.integers(0, 2), min_size=1, max_size=10).map(lambda ids: np.array(ids, np.int32))


def shared(tokens: np.ndarray, query: np.ndarray) -> int:
    pairs = enumerate(zip(tokens, query, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(query)))


@given(st.lists(st.tuples(words, st.booleans()), max_size=12), words)
def test_the_longest_shared_prefix_is_found(known: list[tuple[np.ndarray, bool]], query: np.ndarray) -> None:
    cache = cache_of(1000)
    for tokens, running in known:
        (run if running else keep)(cache, None, tokens)

    slot, length = cache.find(None, query)

    assert length == max((shared(tokens, query) for tokens, _ in known), default=0)
    if slot is None:
        assert length == 0
    else:
        torch.testing.assert_close(cache.read(slot)[:, :, :length], kv_of(query[:length]))


@given(st.lists(words, max_size=30))
def test_ended_sequences_never_exceed_the_capacity(sequences: list[np.ndarray]) -> None:
    cache = cache_of(12)
    for tokens in sequences:
        keep(cache, None, tokens)
        assert cache.tokens <= 12
        assert cache.find(None, tokens)[1] == len(tokens)


def test_running_sequences_may_exceed_the_capacity() -> None:
    cache = cache_of(10)
    ended, running = np.arange(8, dtype=np.int32), np.arange(100, 108, dtype=np.int32)
    keep(cache, None, ended)
    slots = [run(cache, None, running + 10 * number) for number in range(3)]
    assert cache.find(None, ended) == (None, 0)
    assert cache.batch_order() == slots


def test_the_least_recently_used_is_dropped_first() -> None:
    cache = cache_of(10)
    old, used, new = (np.array([first] * 4, np.int32) for first in (1, 2, 3))
    keep(cache, None, used)
    keep(cache, None, old)
    cache.find(None, used)

    keep(cache, None, new)

    assert [cache.find(None, tokens)[1] for tokens in (old, used, new)] == [0, 4, 4]


def test_snapshots_share_nothing_and_free_their_slots() -> None:
    cache, first, second = cache_of(100), Owner(), Owner()
    tokens = np.array([1, 2, 3], np.int32)
    keep(cache, first, tokens)

    assert cache.find(second, tokens) == cache.find(None, tokens) == (None, 0)
    assert cache.find(first, tokens)[1] == cache.tokens == 3
    del first
    gc.collect()
    run(cache, second, tokens[:1])
    assert cache.tokens == 1


def test_a_kept_source_outlives_the_slot_that_copies_it() -> None:
    cache, tokens = cache_of(4), np.arange(4, dtype=np.int32)
    source = keep(cache, None, tokens)
    cache.open(None, np.arange(9, dtype=np.int32), keep=[source])
    torch.testing.assert_close(cache.read(source), kv_of(tokens))
    cache.open(None, np.arange(9, dtype=np.int32))
    assert cache.find(None, tokens)[0] is not source


def test_a_machine_that_is_short_of_memory_gets_back_all_but_the_running_sequences() -> None:
    """At a head size at which a slot fills pages of memory."""
    shape = replace(SHAPE, kv_heads=4, head_size=64)
    cache, tokens = KvCache(shape, torch.empty(0), 1 << 30), np.arange(100, dtype=np.int32)
    kv = kv_of(tokens).expand(2, 2, -1, 4, 2).repeat(1, 1, 1, 1, 32)
    slots = [cache.open(None, tokens + number) for number in range(3)]
    for slot in slots:
        cache.fill(slot, 0, kv)
    cache.park(slots[0], tokens)
    cache.park(slots[1], tokens)
    pool = slots[2].pool

    cache.shrink()

    assert cache.batch_order() == [slots[2]]
    torch.testing.assert_close(cache.read(slots[2]), kv)
    if hasattr(mmap, "MADV_DONTNEED"):
        assert not pool.kv[:, :, 1:].any()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_memory_of_unused_slots_is_given_back_without_touching_the_others(count: int) -> None:
    """Slots of this shape are smaller than a page, so that the layers share pages."""
    cache = cache_of(100_000)
    tokens = [np.arange(1000 * i, 1000 * i + 9, dtype=np.int32) for i in range(count + 2)]
    slots = [run(cache, None, each) for each in tokens]
    for slot, each in zip(slots[count:], tokens[count:], strict=True):
        cache.park(slot, each)

    cache.shrink()

    for slot, each in zip(slots[:count], tokens[:count], strict=True):
        torch.testing.assert_close(cache.read(slot), kv_of(each))


def test_a_pool_grows_with_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_UNUSED_BYTES", 0)
    cache = cache_of(10)
    tokens = [np.arange(1000 * i, 1000 * i + 9, dtype=np.int32) for i in range(20)]
    slots = [run(cache, None, each) for each in tokens]

    assert slots[0].pool.kv.shape[2] < 40, "it began with four slots"
    for slot, each in zip(slots, tokens, strict=True):
        torch.testing.assert_close(cache.read(slot), kv_of(each))


@pytest.mark.parametrize("length", [5, 255, 256, 257, 600])
def test_a_slot_moves_to_a_larger_pool_when_it_is_full(length: int) -> None:
    cache, other = cache_of(10_000), np.arange(7, dtype=np.int32)
    tokens = np.arange(1000, 1000 + length, dtype=np.int32)
    slot, neighbor = run(cache, None, tokens[:100]), run(cache, None, other)
    cache.fill(slot, 0, kv_of(tokens[: slot.pool.capacity]))
    for done in range(slot.length, length):
        cache.make_room([slot, neighbor])
        cache.fill(slot, done, kv_of(tokens[: done + 1])[:, :, done:])

    torch.testing.assert_close(cache.read(slot), kv_of(tokens))
    torch.testing.assert_close(cache.read(neighbor), kv_of(other))


class Slots(RuleBasedStateMachine):
    """Slots keep their contents through opening, ending, resuming, dropping and moves between pools."""

    running = Bundle("running")
    ended = Bundle("ended")

    def __init__(self) -> None:
        super().__init__()
        self.cache = cache_of(100_000)
        self.contents: dict[Slot, np.ndarray] = {}
        self.now_running: set[Slot] = set()
        self.first = 0

    @rule(target=running, length=st.integers(1, 500))
    def open(self, length: int) -> Slot:
        self.first += 1000
        tokens = np.arange(self.first, self.first + length, dtype=np.int32)
        slot = run(self.cache, None, tokens)
        self.contents[slot] = tokens
        self.now_running.add(slot)
        return slot

    @rule(target=ended, slot=consumes(running))
    def end(self, slot: Slot) -> Slot:
        self.cache.park(slot, self.contents[slot])
        self.now_running.remove(slot)
        return slot

    @rule(slot=consumes(running))
    def drop(self, slot: Slot) -> None:
        self.cache.drop(slot)
        del self.contents[slot]
        self.now_running.remove(slot)

    @rule(target=running, slot=consumes(ended), more=st.integers(1, 200))
    def resume(self, slot: Slot, more: int) -> Slot:
        done = len(self.contents[slot])
        start = int(self.contents[slot][0])
        tokens = np.arange(start, start + done + more, dtype=np.int32)
        self.cache.resume(slot, tokens)
        self.cache.fill(slot, done, kv_of(tokens)[:, :, done:])
        self.contents[slot] = tokens
        self.now_running.add(slot)
        return slot

    @invariant()
    def every_slot_has_its_own_tokens(self) -> None:
        assert set(self.cache.batch_order()) == self.now_running
        for slot, tokens in self.contents.items():
            torch.testing.assert_close(self.cache.read(slot), kv_of(tokens))
            assert self.cache.find(None, tokens) == (slot, len(tokens))


TestSlots = Slots.TestCase
