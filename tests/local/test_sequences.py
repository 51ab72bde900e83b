from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.local.backend import SampledSequence
from searchr1_async.local.provenance import SequenceStore, sequence_id

PROMPT = np.arange(10, dtype=np.int32)


def sampled(length: int = 5) -> SampledSequence:
    return SampledSequence(np.arange(length, dtype=np.int32), -np.ones(length, np.float32), "stop")


def ids(*names: str, index: int = 0) -> list[str]:
    return [sequence_id(name, index) for name in names]


def test_a_sequence_is_found_only_in_its_session() -> None:
    store = SequenceStore()
    store.record("s", "r-1", PROMPT, [sampled(1), sampled(2)], now=0.0)
    found = store.use("s", ["r-1:0", "r-1:1"], now=1.0)
    assert [len(found[id].tokens) for id in ("r-1:0", "r-1:1")] == [1, 2]
    assert found["r-1:0"].prompt is found["r-1:1"].prompt, "the prompt is stored once"
    for unknown in ("r-1:2", "r-1:-1", "r-1:00", "r-1:", "r-1", "r-2:0", "", ":0", "r-1:\u0661"):
        assert store.use("s", [unknown], now=1.0) == {}, unknown
    assert store.use("other", ["r-1:0"], now=1.0) == {}
    assert "record_stability_info=True" in store.why_missing()
    assert "24 hours" in store.why_missing()


def test_every_use_renews_a_request() -> None:
    store = SequenceStore(life=10.0)
    for name in ("a", "b"):
        store.record("s", name, PROMPT, [sampled()], now=0.0)
    assert store.use("s", ids("a"), now=9.0)
    store.sweep(now=10.0)
    assert len(store) == 1
    assert not store.use("s", ids("b"), now=10.0)
    assert store.use("s", ids("a"), now=18.0)
    assert not store.use("s", ids("a"), now=28.0), "expired, though not swept yet"
    store.sweep(now=28.0)
    assert (len(store), store.bytes) == (0, 0)


def test_a_session_that_ends_is_forgotten() -> None:
    store = SequenceStore()
    store.record("s", "a", PROMPT, [sampled()], now=0.0)
    store.record("t", "b", PROMPT, [sampled()], now=0.0)
    store.forget("s")
    assert not store.use("s", ids("a"), now=0.0)
    assert store.use("t", ids("b"), now=0.0)


def test_the_least_recently_used_are_dropped_beyond_the_memory_limit(caplog: pytest.LogCaptureFixture) -> None:
    a_request = PROMPT.nbytes + 2 * 5 * 8
    store = SequenceStore(most_bytes=2 * a_request)
    store.record("s", "a", PROMPT, [sampled(), sampled()], now=0.0)
    store.record("s", "b", PROMPT, [sampled(), sampled()], now=1.0)
    assert store.use("s", ids("a"), now=2.0)
    store.record("s", "c", PROMPT, [sampled(), sampled()], now=3.0)
    assert store.bytes == 2 * a_request
    assert store.use("s", ids("a", "b", "c"), now=3.0).keys() == set(ids("a", "c"))
    assert "has dropped 2 of the least recently used" in store.why_missing()
    store.record("s", "d", PROMPT, [sampled(), sampled()], now=4.0)
    assert len(caplog.records) == 1, "logged once"


events = st.lists(
    st.tuples(st.sampled_from(["record", "use", "sweep", "forget"]), st.integers(0, 4), st.integers(0, 4)), max_size=40
)


@given(events)
def test_the_store_matches_a_model(happened: list[tuple[str, int, int]]) -> None:
    store, alive, now, count = SequenceStore(life=6.0), dict[str, tuple[str, float]](), 0.0, 0
    for what, number, wait in happened:
        now += wait
        session = f"s{number % 2}"
        if what == "record":
            store.record(session, f"r{count}", PROMPT, [sampled()], now)
            alive[f"r{count}"], count = (session, now), count + 1
        elif what == "use" and count:
            name = f"r{number % count}"
            expected = name in alive and alive[name][0] == session and now - alive[name][1] < 6.0
            assert bool(store.use(session, ids(name), now)) == expected
            if expected:
                alive[name] = session, now
        elif what == "sweep":
            store.sweep(now)
            alive = {name: (owner, used) for name, (owner, used) in alive.items() if now - used < 6.0}
            assert len(store) == len(alive)
        elif what == "forget":
            store.forget(session)
            alive = {name: entry for name, entry in alive.items() if entry[0] != session}
        assert store.bytes == len(store) * (PROMPT.nbytes + 40)
