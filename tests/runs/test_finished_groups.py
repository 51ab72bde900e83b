from __future__ import annotations

import logging
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.boundary.paths import parquet_bytes
from searchr1_async.episodes.table import kept_groups_frame, storable
from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason, Turn
from searchr1_async.runs import folder as unlearned
from searchr1_async.runs.folder import UnlearnedGroups
from tests.watch.builders import answering_turn, episode, group, question, searching_turn

TEXT = st.text(st.characters() | st.just("\udcff"), max_size=20)
NUMBER = st.floats(allow_nan=False)
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
PASSAGES = st.lists(st.builds(Passage, TEXT, TEXT, TEXT, NUMBER), max_size=2).map(tuple)
CALLS = st.builds(
    SearchCall,
    st.lists(TEXT, max_size=2).map(tuple),
    st.lists(PASSAGES, max_size=2).map(tuple),
    st.none() | TEXT,
    NUMBER,
)
TURNS = st.builds(
    Turn,
    TOKENS,
    st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(tuple),
    TEXT,
    TEXT,
    st.integers(0, 2**40),
    st.none() | CALLS,
    TOKENS,
    NUMBER,
    st.booleans(),
)
METADATA = st.dictionaries(TEXT, st.none() | TEXT | NUMBER | st.integers() | st.lists(TEXT, max_size=2), max_size=2)
QUESTIONS = st.builds(Question, TEXT, TEXT.map("?{}".format), st.just(("Paris", "\udcff\x00")), TEXT, METADATA)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    asked = draw(QUESTIONS)
    played = st.builds(
        Episode,
        st.just(asked),
        TOKENS,
        st.lists(TURNS, max_size=2).map(tuple),
        st.sampled_from(StopReason),
        st.none() | TEXT,
        NUMBER,
        st.dictionaries(TEXT, NUMBER, max_size=2),
        st.none() | TEXT,
        NUMBER,
    )
    several = st.lists(played, max_size=2).map(tuple)
    return Group(asked, draw(several), draw(several))


def stored(value: Any) -> Any:
    """``value`` with its texts as the codec stores them: lone surrogates become U+FFFD. Metadata are JSON, which keeps them."""
    if isinstance(value, StopReason):
        return value
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, tuple):
        return tuple(map(stored, value))
    if isinstance(value, Mapping):
        return {storable(name): number for name, number in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.name != "metadata"]
        return replace(value, **{name: stored(getattr(value, name)) for name in names})
    return value


def part(folder: Path, number: int, content: bytes) -> Path:
    """A file with this content and its checksum."""
    path = folder / f"{number:08d}-{zlib.crc32(content):08x}.parquet"
    path.write_bytes(content)
    return path


@given(written=groups())
@settings(max_examples=40, deadline=None)
def test_group_round_trips(written: Group) -> None:
    with tempfile.TemporaryDirectory() as folder:
        UnlearnedGroups(Path(folder)).write({7: written})
        (read,) = UnlearnedGroups(Path(folder)).load().items()
    assert read == (7, stored(written))


def test_given_passages_round_trip_and_old_groups_are_read(tmp_path: Path) -> None:
    given = SearchCall(("Which?",), ((Passage("1", "Etna", "It burns.", 0.5),), ()), None, 0.25)
    played = Group(question(), (replace(episode(), given=given), episode()))
    UnlearnedGroups(tmp_path / "new").write({3: played})
    assert UnlearnedGroups(tmp_path / "new").load() == {3: played}
    odd = replace(episode(), given=replace(given, seconds=float("inf")))
    UnlearnedGroups(tmp_path / "odd").write({3: Group(question(), (odd,))})
    assert UnlearnedGroups(tmp_path / "odd").load()[3].episodes == (odd,)

    plain = Group(question(), (episode(),))
    (tmp_path / "old").mkdir()
    part(tmp_path / "old", 1, parquet_bytes(kept_groups_frame({3: plain}).drop("given")))
    assert UnlearnedGroups(tmp_path / "old").load() == {3: plain}


def test_log_probabilities_round_trip_exactly(tmp_path: Path) -> None:
    sampled = np.random.default_rng(1).integers(0, 2**32, 5000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    logprobs = tuple(sampled[~np.isnan(sampled)].tolist())
    played = Group(question(), (episode(turns=[replace(answering_turn(), logprobs=(*logprobs, -0.0))]),))
    UnlearnedGroups(tmp_path).write({0: played})
    (turn,) = UnlearnedGroups(tmp_path).load()[0].episodes[0].turns
    assert np.array(turn.logprobs, np.float64).tobytes() == np.array((*logprobs, -0.0), np.float64).tobytes()


def test_values_that_json_lacks_are_kept_as_far_as_possible(tmp_path: Path) -> None:
    odd: dict[Any, Any] = {
        "path": Path("a/b"),
        "hop": (1, 2),
        3: "three",
        "score": np.float64(0.5),
        "count": np.int64(7),
    }
    asked = replace(question(), metadata=odd)
    turn = replace(searching_turn(), seconds=float("nan"))
    UnlearnedGroups(tmp_path).write({1: Group(asked, (episode(asked, turns=[turn]),))})
    read = UnlearnedGroups(tmp_path).load()[1]
    assert read.question.metadata == {"path": "a/b", "hop": [1, 2], "3": "three", "score": 0.5, "count": 7}
    assert np.isnan(read.episodes[0].turns[0].seconds)


def test_forgotten_groups_are_not_loaded(tmp_path: Path) -> None:
    kept = {place: group(question(f"q{place}"), failed=place % 2) for place in range(5)}
    store = UnlearnedGroups(tmp_path / "unlearned")
    assert store.load() == {}
    store.forget([1])
    store.write(kept)
    store.forget([1, 0, 99])
    later = group(corrects=(0.0, 0.0))
    store.write({2: later})
    assert UnlearnedGroups(tmp_path / "unlearned").load() == {2: later, 3: kept[3], 4: kept[4]}
    store.forget([2, 3, 4])
    assert list((tmp_path / "unlearned").iterdir()) == []
    store.write({4: kept[4]})
    store.clear()
    assert UnlearnedGroups(tmp_path / "unlearned").load() == {}
    store.write({4: kept[4]})
    assert UnlearnedGroups(tmp_path / "unlearned").load() == {4: kept[4]}


@pytest.fixture(scope="module")
def written() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        UnlearnedGroups(Path(folder)).write({3: group(question("q3"))})
        (path,) = Path(folder).iterdir()
        yield path


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_damage_neither_raises_nor_invents_groups(written: Path, data: st.DataObject) -> None:
    content = written.read_bytes()
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)), label="cut at")])
    for _ in range(data.draw(st.integers(0, 3), label="flips") if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / written.name).write_bytes(damaged)
        store = UnlearnedGroups(Path(folder))
        read = store.load()
        assert read == ({3: group(question("q3"))} if damaged == content else {}), "a damaged file gives nothing"
        store.write({9: group()})  # later writes are not hidden by the damage
        assert UnlearnedGroups(Path(folder)).load() == read | {9: group()}


NO_GROUPS = {
    "empty": b"",
    "text": b"{}",
    "cut": parquet_bytes(kept_groups_frame({2: group()}))[:-100],
    "foreign": parquet_bytes(pl.DataFrame({"made": ["elsewhere"]})),
    "without a place": parquet_bytes(kept_groups_frame({2: group()}).with_columns(place=pl.lit(None, pl.Int64))),
    "another stop reason": parquet_bytes(kept_groups_frame({2: group()}).with_columns(stop_reason=pl.lit("tired"))),
    "no metadata": parquet_bytes(kept_groups_frame({2: group()}).with_columns(metadata=pl.lit("[" * 100_000))),
}


@pytest.mark.parametrize("content", NO_GROUPS.values(), ids=NO_GROUPS)
def test_a_file_without_groups_is_skipped_and_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    UnlearnedGroups(tmp_path).write({1: group()})
    (tmp_path / "notes.txt").write_text("mine")
    damaged = part(tmp_path, 2, content)
    with caplog.at_level(logging.WARNING):
        assert UnlearnedGroups(tmp_path).load() == {1: group()}
    assert f"{damaged} is damaged" in caplog.text
    assert not damaged.exists()
    assert (tmp_path / "notes.txt").exists()


def test_full_disk_keeps_earlier_groups_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = UnlearnedGroups(tmp_path)
    store.write({1: group()})

    def full_disk(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(unlearned, "write_atomically", full_disk)
        with pytest.raises(OSError, match="No space"):
            store.write({2: group()})
    store.write({4: group()})
    assert sorted(UnlearnedGroups(tmp_path).load()) == [1, 4]
