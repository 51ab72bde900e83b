"""What the caches keep and evict, and that a bad disk, a kill or another process costs no more than the cache."""

from __future__ import annotations

import logging
import os
import random
import signal
import sqlite3
import sys
from collections.abc import Iterable
from pathlib import Path
from subprocess import PIPE, Popen, run

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import searchr1_async
from searchr1_async.episodes.types import Passage
from searchr1_async.search import cache as cache_module
from searchr1_async.search.cache import AnswerFile, AnswerKey, LeastRecentlyUsed

MEBIBYTE = 1 << 20


def test_what_was_used_last_stays_in_memory() -> None:
    cache: LeastRecentlyUsed[str, int] = LeastRecentlyUsed(2)
    for key in ("a", "b"):
        cache.put(key, 1)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert [cache.get(key) for key in ("a", "b", "c")] == [1, None, 3]


def test_a_memory_of_no_entries_keeps_none() -> None:
    cache: LeastRecentlyUsed[str, int] = LeastRecentlyUsed(0)
    cache.put("a", 1)
    assert cache.get("a") is None


# The file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search # 1" / "cache.sqlite"


def key(number: int) -> AnswerKey:
    return AnswerKey(f"query {number}", 3, None)


def answer(number: int) -> tuple[Passage, ...]:
    """About 2 KB."""
    return (Passage(f"p{number}", "Title", random.Random(number).randbytes(1024).hex(), number / 7),)


def opened(path: Path, max_bytes: int = 64 * MEBIBYTE) -> AnswerFile:
    return AnswerFile(path, max_bytes)


def fill(cache: AnswerFile, numbers: Iterable[int]) -> None:
    for number in numbers:
        cache.put_many("n", {key(number): answer(number)})


def holds(cache: AnswerFile, count: int) -> list[int]:
    """The numbers that are there, each with its own answer."""
    found = cache.get_many("n", [key(number) for number in range(count)])
    numbers = [number for number in range(count) if key(number) in found]
    assert all(found[key(number)] == answer(number) for number in numbers)
    return numbers


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


any_text = st.text(max_size=30)
any_passage = st.builds(Passage, any_text, any_text, any_text, st.floats())


@settings(deadline=None, max_examples=50)
@given(st.lists(any_passage, max_size=4).map(tuple))
def test_answers_come_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, given: tuple[Passage, ...]
) -> None:
    cache = opened(tmp_path_factory.mktemp("cache") / "cache.sqlite")
    cache.put_many("n", {key(1): given})
    # By repr: nan equals nan, and -0.0 differs from 0.0.
    assert repr(cache.get_many("n", [key(1)])) == repr({key(1): given})
    cache.close()


def test_scores_of_numpy_and_text_that_is_no_unicode(path: Path) -> None:
    cache = opened(path)
    cache.put_many("n", {key(2): (Passage("\ud800", "", "", 0.5),), key(1): (Passage("1", "", "", np.float32(0.5)),)})
    assert cache.get_many("n", [key(1), key(2)]) == {key(1): (Passage("1", "", "", 0.5),)}
    cache.close()


def test_an_answer_is_of_its_index_number_and_words(path: Path) -> None:
    cache = opened(path)
    cache.put_many("n", {AnswerKey("q", 3, None): answer(1), AnswerKey("q", 3, 5): answer(2)})
    cache.put_many("n", {key(1): answer(1)})
    cache.close()
    cache = opened(path)
    others = [AnswerKey("q", 2, None), AnswerKey("q", 3, 4), AnswerKey("Q", 3, None)]
    assert cache.get_many("n", [AnswerKey("q", 3, 5), *others]) == {AnswerKey("q", 3, 5): answer(2)}
    assert cache.get_many("another", [AnswerKey("q", 3, 5)]) == {}
    cache.close()
    assert b"query 1" not in path.read_bytes()


def test_what_was_put_first_goes_first_and_the_file_stays_within_its_bound(path: Path) -> None:
    cache = opened(path, MEBIBYTE)
    fill(cache, range(300))
    assert holds(cache, 300) == list(range(300))
    put_again = range(0, 300, 3)
    fill(cache, put_again)
    fill(cache, range(300, 550))
    left = set(holds(cache, 550))
    assert left >= {*put_again, *range(300, 550)}
    gone = set(range(550)) - left
    assert 50 < len(gone) < 250
    assert gone == set(sorted(set(range(300)) - set(put_again))[: len(gone)])
    fill(cache, range(550, 2000))
    cache.close()
    assert path.stat().st_size <= 1.1 * MEBIBYTE
    assert len(holds(cache, 2000)) > 0.7 * MEBIBYTE / 2100
    cache.close()


# Several processes

WORKER = """
import sys, random
from pathlib import Path
from tests.search.test_cache import AnswerFile, answer, key

path, worker, rounds, max_bytes, keys_in_all = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
cache = AnswerFile(Path(path), max_bytes)
generator = random.Random(worker)
print("ready", flush=True)
sys.stdin.readline()
hits = 0
for number in range(rounds):
    numbers = {generator.randrange(keys_in_all) for _ in range(10)}
    found = cache.get_many("n", [key(each) for each in numbers])
    assert all(found[key(each)] == answer(each) for each in numbers if key(each) in found)
    hits += len(found) / len(numbers)
    cache.put_many("n", {key(each): answer(each) for each in numbers if key(each) not in found})
    print(number, flush=True)
cache.close()
print(hits, flush=True)
"""


def start_worker(path: Path, name: str, rounds: int, *, max_bytes: int = 2 << 30, keys: int = 300) -> Popen[str]:
    given = [str(each) for each in (path, name, rounds, max_bytes, keys)]
    root = Path(searchr1_async.__file__).parent.parent
    return Popen([sys.executable, "-c", WORKER, *given], stdin=PIPE, stdout=PIPE, text=True, cwd=root)


def let_go(workers: list[Popen[str]]) -> None:
    """Starts all workers at once, so that they race to create the file."""
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()


def finish(workers: list[Popen[str]]) -> list[float]:
    outputs = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    return [float(output[-1]) for output in outputs]


def is_whole(path: Path) -> bool:
    connection = sqlite3.connect(path)
    found = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    return found


def test_processes_share_one_file_from_its_making_on(path: Path) -> None:
    workers = [start_worker(path, str(number), 100) for number in range(3)]
    let_go(workers)
    # Of 100 rounds, a lone worker would hit 71; together they hit 87.
    assert sum(finish(workers)) > 3 * 80
    cache = opened(path)
    assert len(holds(cache, 300)) == 300
    cache.close()


def test_what_another_process_wrote_while_this_one_opens_a_new_file_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, cache, read = opened(path), opened(path), cache_module._pragma

    def interrupted(connection: sqlite3.Connection, name: str) -> int:
        found = read(connection, name)
        if name == "schema_version":
            monkeypatch.undo()
            fill(other, range(3))
        return found

    path.parent.mkdir()
    monkeypatch.setattr(cache_module, "_pragma", interrupted)
    assert holds(cache, 3) == [0, 1, 2]
    cache.close()
    other.close()


def test_processes_that_write_more_than_the_bound_keep_to_it_together(path: Path) -> None:
    workers = [start_worker(path, str(number), 150, max_bytes=MEBIBYTE, keys=100_000) for number in range(2)]
    let_go(workers)
    finish(workers)
    assert path.stat().st_size <= 1.1 * MEBIBYTE
    assert is_whole(path)


def test_a_process_killed_while_it_writes_leaves_what_it_had_written(path: Path) -> None:
    rounds = 40
    worker = start_worker(path, "killed", 100_000, max_bytes=MEBIBYTE, keys=100_000)
    let_go([worker])
    assert worker.stdout is not None
    for _ in range(rounds):
        worker.stdout.readline()
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    cache = opened(path, MEBIBYTE)
    generator = random.Random("killed")
    written = [{generator.randrange(100_000) for _ in range(10)} for _ in range(rounds)]
    for numbers in written[-10:]:
        assert set(cache.get_many("n", [key(each) for each in numbers])) == {key(each) for each in numbers}
    fill(cache, range(5))
    assert holds(cache, 5) == list(range(5))
    cache.close()
    assert is_whole(path)


def test_while_another_writes_for_long_reading_goes_on_and_a_put_is_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "_BUSY_SECONDS", 0.01)
    cache = opened(path)
    fill(cache, range(3))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    fill(cache, range(3, 4))
    assert holds(cache, 4) == [0, 1, 2]
    other.execute("ROLLBACK")
    other.close()
    fill(cache, range(4, 5))
    assert holds(cache, 5) == [0, 1, 2, 4]
    assert warnings_of(caplog) == []
    cache.close()


# A bad disk


def foreign(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE accounts (name TEXT)")
    connection.commit()
    connection.close()


def newer(path: Path) -> None:
    cache = opened(path)
    fill(cache, range(3))
    cache.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 1000")
    connection.close()


@pytest.mark.parametrize("kind", ["text", "broken header", "another program's", "newer", "a folder", "below a file"])
def test_what_is_no_cache_is_left_alone_and_the_run_goes_on(
    path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    match kind:
        case "text":
            path.write_bytes(b"notes of the user, not a database\n" * 1000)
        case "broken header":
            path.write_bytes(b"SQLite format 3\0" + bytes(5000))
        case "another program's":
            foreign(path)
        case "newer":
            newer(path)
        case "a folder":
            path.mkdir()
        case _:
            path.touch()
            path = path / "cache.sqlite"
    before = path.read_bytes() if path.is_file() else None
    cache = opened(path)
    for _ in range(2):
        fill(cache, range(3))
        assert holds(cache, 3) == []
    cache.close()
    assert before == (path.read_bytes() if path.is_file() else None)
    (warning,) = warnings_of(caplog)
    assert "continues without it" in warning


def test_an_earlier_format_is_begun_anew_and_an_empty_file_is_no_damage(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.touch()
    cache = opened(path)
    fill(cache, range(3))
    assert holds(cache, 3) == [0, 1, 2]
    cache.close()
    changed(path, "PRAGMA user_version = 2")
    cache = opened(path)
    assert holds(cache, 3) == []
    fill(cache, range(1))
    assert holds(cache, 3) == [0]
    assert warnings_of(caplog) == []
    cache.close()


def changed(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("seed", range(4))
def test_bytes_changed_anywhere_give_misses_and_never_another_answer(path: Path, seed: int) -> None:
    generator = random.Random(seed)
    cache = opened(path)
    fill(cache, range(100))
    cache.close()
    for _ in range(20):
        with path.open("r+b") as file:
            for _ in range(generator.choice((1, 30))):
                file.seek(generator.randrange(100, path.stat().st_size))
                file.write(generator.randbytes(generator.choice((1, 8))))
        cache = opened(path)
        holds(cache, 110)
        fill(cache, range(100, 110))
        holds(cache, 110)
        cache.close()


@pytest.mark.parametrize("size", [100, 512, 20_000, 40_000])
def test_a_file_cut_short_is_used_no_more(path: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    cache = opened(path)
    fill(cache, range(100))
    cache.close()
    os.truncate(path, size)
    holds(cache, 100)
    fill(cache, range(100))
    cache.close()
    (warning,) = warnings_of(caplog)
    assert "delete the file" in warning


def test_an_entry_that_is_another_ones_or_text_is_a_miss_and_written_anew(path: Path) -> None:
    for value in ("(SELECT value FROM answers WHERE rowid = 2)", "'text'", "7"):
        cache = opened(path)
        fill(cache, range(3))
        cache.close()
        changed(path, f"UPDATE answers SET value = {value}")
        assert 0 not in holds(cache, 3)
        fill(cache, range(3))
        assert holds(cache, 3) == [0, 1, 2]
        cache.close()


def test_a_cache_without_its_table_is_used_no_more(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = opened(path)
    fill(cache, range(3))
    cache.close()
    changed(path, "DROP TABLE answers")
    assert holds(cache, 3) == []
    fill(cache, range(3))
    assert len(warnings_of(caplog)) == 1


def test_a_kill_while_the_file_is_made_leaves_one_that_can_be_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    monkeypatch.setattr(cache_module, "_APPLICATION_ID", "no number")
    fill(opened(path), range(3))
    monkeypatch.undo()
    cache = opened(path)
    fill(cache, range(3))
    assert holds(cache, 3) == [0, 1, 2]
    cache.close()


FULL_DISK = """
import logging, resource, signal, sys
from pathlib import Path
from tests.search.test_cache import AnswerFile, answer, key

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = AnswerFile(Path(sys.argv[1]), 64 << 20)
cache.put_many("n", {key(0): answer(0)})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for number in range(1, 1000):
    cache.put_many("n", {key(number): answer(number)})
print(cache.get_many("n", [key(0)]))
cache.close()
"""


def test_on_a_full_disk_the_run_goes_on_and_one_warning_is_given(path: Path) -> None:
    root = Path(searchr1_async.__file__).parent.parent
    ended = run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=60, cwd=root)
    assert ended.returncode == 0, ended.stderr
    warning, found = ended.stdout.splitlines()
    assert warning.startswith("WARNING the cache")
    assert "continues without it" in warning
    assert found == "{}"
    cache = opened(path)
    fill(cache, range(3))
    assert holds(cache, 3) == [0, 1, 2]
    cache.close()
