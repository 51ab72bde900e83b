from __future__ import annotations

import gc
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from searchr1_async.episodes.table import EpisodeRow, storable
from searchr1_async.episodes.types import StopReason
from searchr1_async.errors import RunFolderError
from searchr1_async.evaluation.episode_store import EpisodeStore, SampleKey
from searchr1_async.records import run_records as store_module
from tests.watch.builders import HOSTILE, answering_turn, episode, question

VERDICTS = "verdicts.parquet"


def played(system: str, place: int, sample: int, correct: float | None = 1.0, text: str = "") -> EpisodeRow:
    """A sample; None: the episode failed."""
    asked = question(f"q{place}", "a")
    turns = (answering_turn(text),) if text else None
    made = (
        episode(asked, stop_reason=StopReason.FAILED, turns=())
        if correct is None
        else episode(asked, correct=correct, turns=turns)
    )
    return EpisodeRow(made, 3, system, group=place, member=sample, trained=False)


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "episodes").iterdir())


def test_what_was_written_is_there_in_a_new_session(tmp_path: Path) -> None:
    first = EpisodeStore(tmp_path)
    assert first.load() == set()
    first.write([played("a", 1, 0), played("b", 0, 1, 0.0)])
    first.write([played("a", 0, 0, None)])
    first.write([])
    assert parts(tmp_path) == ["000001.parquet", "000002.parquet"]
    second = EpisodeStore(tmp_path)
    assert second.load() == {("a", 1, 0), ("b", 0, 1)}, "a failed one is to be played again"
    assert second.scores().equals(first.scores())
    assert second.scores().select("system", "place", "sample", "failed").rows() == [
        ("a", 0, 0, True),
        ("a", 1, 0, False),
        ("b", 0, 1, False),
    ]
    assert [each.question.id for each in second.episodes("a")] == ["q0", "q1"]
    assert second.episodes("a")[1] == played("a", 1, 0).episode
    assert second.frame().collect().height == 3


def test_of_two_records_the_later_counts(tmp_path: Path) -> None:
    first = EpisodeStore(tmp_path)
    first.write([played("a", 0, 0, None)])
    second = EpisodeStore(tmp_path)
    second.load()
    second.write([played("a", 0, 0, 1.0)])
    for store in (second, EpisodeStore(tmp_path)):
        store.load()
        assert store.scores()["failed"].to_list() == [False]
        assert [each.failed for each in store.episodes("a")] == [False]
    second.finish()
    assert second.frame().collect()["stop_reason"].to_list() == ["answer"], "a merged file holds a sample once"


def test_a_process_that_was_killed_while_it_wrote_leaves_nothing_that_counts(tmp_path: Path) -> None:
    first = EpisodeStore(tmp_path)
    first.write([played("a", 0, 0)])
    torn = tmp_path / "episodes" / ".000002.parquet.abcd"
    torn.write_bytes(b"PAR1 torn")
    (tmp_path / "episodes" / "notes.txt").write_text("of somebody else")
    second = EpisodeStore(tmp_path)
    assert second.load() == {("a", 0, 0)}
    assert parts(tmp_path) == ["000001.parquet", "notes.txt"]


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    first = EpisodeStore(tmp_path)
    first.write([played("a", 0, 0)])
    (tmp_path / "episodes" / "000001.parquet").write_bytes(b"no table")
    for read in (first.load, lambda: first.episodes("a")):
        with pytest.raises(RunFolderError, match=str(tmp_path)):
            read()


class Killed(BaseException):
    """Simulates a killed process."""


@contextmanager
def killed_after(operations: int) -> Iterator[None]:
    """Performs this many disk operations and then none, like a killed process."""
    left = iter(range(operations))

    def until_killed(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*arguments: Any, **named: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return operation(*arguments, **named)

        return operate

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, until_killed(getattr(owner, name)))
        yield


def rows_of(folder: Path) -> list[int]:
    """Per file, in order."""
    return [pl.read_parquet(folder / "episodes" / name).height for name in parts(folder)]


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Identity of a file, to detect rewrites."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "episodes").iterdir()}


def write_session(folder: Path) -> EpisodeStore:
    """Failed episodes retried in the same, the next and a later file."""
    store = EpisodeStore(folder)
    store.write([played("a", 0, 0, None), played("a", 4, 0)])
    store.write([played("a", 0, 0, 1.0), played("a", 1, 0, None), played("a", 1, 0, 0.0)])
    store.write([played("a", 2, 0, None), played("b", 2, 0)])
    store.write([played("a", 3, 0, None)])
    store.write([played("b", 0, 0)])
    store.write([played("a", 2, 0, 0.0), played("a", 3, 0)])
    return store


def test_small_files_are_merged_and_full_ones_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MERGED_ROWS", 4)
    store = EpisodeStore(tmp_path)
    for place in range(10):
        store.write([played("a", place, 0, None if place == 9 else 1.0)])
    store.finish()
    assert rows_of(tmp_path) == [4, 4, 2]
    before = states(tmp_path)
    store.finish()
    assert states(tmp_path) == before
    again = EpisodeStore(tmp_path)
    again.load()
    again.write([played("a", 9, 0, 1.0), played("a", 10, 0)])
    again.finish()
    assert parts(tmp_path) == ["000004.parquet", "000008.parquet", "000011.parquet"]
    now = states(tmp_path)
    assert {name for name in now if now[name] == before.get(name)} == {"000004.parquet", "000008.parquet"}
    assert rows_of(tmp_path) == [4, 4, 3], "the record that was replaced is gone"


def test_merging_holds_no_more_than_one_files_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak rows in memory, counted before each write over all live tables; the merged table is a second copy."""
    monkeypatch.setattr(store_module, "_MERGED_ROWS", 8)
    store = EpisodeStore(tmp_path)
    for first in range(0, 28, 2):
        store.write([played("a", first, 0), played("a", first + 1, 0)])
    held: list[int] = []
    write = store_module.write_parquet

    def counting(path: Path, frame: pl.DataFrame) -> None:
        alive = [each for each in gc.get_objects() if type(each) is pl.DataFrame]
        held.append(sum(each.height for each in alive if "transcript" in each.columns))
        write(path, frame)

    monkeypatch.setattr(store_module, "write_parquet", counting)
    store.finish()
    assert rows_of(tmp_path) == [8, 8, 8, 4]
    assert len(held) == 4
    assert 8 <= max(held) <= 2 * 8


def test_a_kill_while_merging_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after each operation, and another in the following merge."""
    monkeypatch.setattr(store_module, "_MERGED_ROWS", 3)
    whole = write_session(tmp_path / "whole")
    samples = {("a", place, 0) for place in range(5)} | {("b", 0, 0), ("b", 2, 0)}
    was_killed, operations = True, 0
    while was_killed:
        folder = tmp_path / str(operations)
        store, was_killed = write_session(folder), False
        for _ in range(2):
            try:
                with killed_after(operations):
                    store.finish()
            except Killed:
                was_killed = True
            store = EpisodeStore(folder)
            assert store.load() == samples
            assert store.scores().equals(whole.scores())
            assert store.episodes("a") == whole.episodes("a")
        store.finish()
        assert not list((folder / "episodes").glob(".*"))
        last = EpisodeStore(folder)
        assert last.load() == samples
        assert last.scores().equals(whole.scores())
        operations += 1
    assert operations > 8, "files are written, put in place and followed by their neighbours' ends"


def test_verdicts_are_kept_and_asked_for_once(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path, VERDICTS)
    store.write([played("a", 0, 0), played("a", 1, 0), played("b", 0, 0), played("b", 1, 0, None)])
    assert store.unjudged().height == 3, "one that failed has no answer to judge"
    assert store.unjudged(["a"])["question_id"].sort().to_list() == ["q0", "q1"]
    store.write_judgements([("a", 0, 0, 1.0), ("a", 1, 0, None)])
    again = EpisodeStore(tmp_path, VERDICTS)
    again.load()
    for each in (store, again):
        assert each.unjudged().select("system", "place").rows() == [("b", 0)]
        assert each.scores()["judged"].to_list() == [1.0, None, None, None]
    again.write_judgements([("b", 0, 0, 0.0)])
    assert again.unjudged().is_empty()
    assert again.scores()["judged"].to_list() == [1.0, None, 0.0, None]


def test_without_a_folder_it_goes_with_the_object() -> None:
    store = EpisodeStore(None)
    folder = store.folder
    store.write([played("a", 0, 0)])
    assert not store.is_kept
    assert parts(folder) == ["000001.parquet"]
    del store
    gc.collect()
    assert not folder.exists()


def test_hostile_text_comes_back_as_it_was(tmp_path: Path) -> None:
    sample = played(storable(HOSTILE), 0, 0, text=HOSTILE)
    store = EpisodeStore(tmp_path)
    store.write([sample])
    again = EpisodeStore(tmp_path)
    assert again.load() == {(storable(HOSTILE), 0, 0)}
    assert again.episodes(storable(HOSTILE))[0].turns[0].text == storable(HOSTILE)


def test_many_threads_write_side_by_side(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)

    def write(number: int) -> None:
        for place in range(8):
            store.write([played(f"s{number}", place, 0)])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = EpisodeStore(tmp_path)
    assert len(again.load()) == 32
    assert again.scores().equals(store.scores())


KEYS = st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3), st.integers(0, 1))
CORRECT = st.sampled_from([None, 0.0, 1.0])


class StoreMachine(RuleBasedStateMachine):
    """Any order of writes, merges, verdicts and kills keeps the newest record of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self._scratch = tempfile.TemporaryDirectory()
        self._folder = Path(self._scratch.name)
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(store_module, "_MERGED_ROWS", 3)
        self._store = EpisodeStore(self._folder, VERDICTS)
        self._newest: dict[SampleKey, float | None] = {}
        self._verdicts: dict[SampleKey, float | None] = {}

    @rule(samples=st.dictionaries(KEYS, CORRECT, max_size=4))
    def write(self, samples: dict[SampleKey, float | None]) -> None:
        self._store.write([played(*key, correct) for key, correct in samples.items()])
        self._newest |= samples

    @rule()
    def finish(self) -> None:
        self._store.finish()
        self._holds_its_episodes()

    @rule(operations=st.integers(0, 9))
    def is_killed_while_it_merges(self, operations: int) -> None:
        with suppress(Killed), killed_after(operations):
            self._store.finish()
        self.begin_a_session()

    @rule()
    def begin_a_session(self) -> None:
        self._store = EpisodeStore(self._folder, VERDICTS)
        assert self._store.load() == {key for key, correct in self._newest.items() if correct is not None}
        self._holds_its_episodes()

    @rule(verdict=st.sampled_from([None, 0.0, 1.0]))
    def judge(self, verdict: float | None) -> None:
        left = self._store.unjudged()
        keys = {(row["system"], row["place"], row["sample"]) for row in left.iter_rows(named=True)}
        assert keys == {key for key, correct in self._newest.items() if correct is not None} - set(self._verdicts)
        self._store.write_judgements([(*key, verdict) for key in keys])
        self._verdicts |= dict.fromkeys(keys, verdict)

    @invariant()
    def holds_the_newest(self) -> None:
        columns = ("system", "place", "sample", "exact_match", "judged")
        found = {tuple(row[:3]): row[3:] for row in self._store.scores().select(columns).iter_rows()}
        assert found == {key: (correct, self._verdicts.get(key)) for key, correct in self._newest.items()}

    def _holds_its_episodes(self) -> None:
        for system in "ab":
            told = [each.reward_parts.get("correct") for each in self._store.episodes(system)]
            own = sorted((key, correct) for key, correct in self._newest.items() if key[0] == system)
            assert told == [correct for _, correct in own]

    def teardown(self) -> None:
        self._patch.undo()
        self._scratch.cleanup()


TestInterleavings = StoreMachine.TestCase
TestInterleavings.settings = settings(max_examples=12, stateful_step_count=14, deadline=None)
