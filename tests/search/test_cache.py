"""What the caches keep and evict, and that a bad disk, a kill or another process costs no more than the cache."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen, run

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import searchr1_async
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError
from searchr1_async.search import cache as disk_cache
from searchr1_async.search.cache import DiskCache, LeastRecentlyUsed, decode_passages, encode_passages

MEBIBYTE = 1 << 20


class LeastRecentlyUsedMachine(RuleBasedStateMachine):
    """Against a list of keys in order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: LeastRecentlyUsed[int, int] = LeastRecentlyUsed(3)
        self.order: list[int] = []
        self.values: dict[int, int] = {}

    @rule(key=st.integers(0, 5), value=st.integers(0, 3))
    def put(self, key: int, value: int) -> None:
        self.cache.put(key, value)
        self.order = [*(other for other in self.order if other != key), key][-3:]
        self.values[key] = value

    @rule(key=st.integers(0, 5))
    def get(self, key: int) -> None:
        assert self.cache.get(key) == (self.values[key] if key in self.order else None)
        if key in self.order:
            self.order = [*(other for other in self.order if other != key), key]

    @invariant()
    def holds_as_many(self) -> None:
        assert len(self.cache) == len(self.order)


TestLeastRecentlyUsed = LeastRecentlyUsedMachine.TestCase
TestLeastRecentlyUsed.settings = settings(max_examples=50, deadline=None)


def test_a_memory_of_no_entries_keeps_none_and_a_negative_one_is_refused() -> None:
    cache: LeastRecentlyUsed[str, int] = LeastRecentlyUsed(0)
    cache.put("a", 1)
    assert cache.get("a") is None
    with pytest.raises(ConfigurationError, match="max_entries"):
        LeastRecentlyUsed(-1)


# Passages as bytes

any_text = st.text(st.characters(), max_size=30)  # lone surrogates included
passages = st.lists(st.builds(Passage, any_text, any_text, any_text, st.floats()), max_size=4).map(tuple)


@given(passages)
def test_passages_come_back_to_the_last_bit(given_passages: tuple[Passage, ...]) -> None:
    # By repr: nan equals nan, and -0.0 differs from 0.0.
    assert repr(decode_passages(encode_passages(given_passages))) == repr(given_passages)


def test_two_lone_surrogates_do_not_become_one_character() -> None:
    passage = Passage("1", "\ud83d\ude00", "\U0001f600", 0.1)
    assert decode_passages(encode_passages([passage])) == (passage,)


@given(passages.filter(bool), st.data())
def test_bytes_cut_short_lengthened_or_of_another_version_are_a_miss(
    given_passages: tuple[Passage, ...], data: st.DataObject
) -> None:
    encoded = encode_passages(given_passages)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    assert decode_passages(encoded[:cut]) is None
    assert decode_passages(encoded + b"\0") is None
    assert decode_passages(bytes([encoded[0] + 1]) + encoded[1:]) is None


@given(st.binary(max_size=200))
def test_any_other_bytes_are_a_miss_or_passages_but_no_error(data: bytes) -> None:
    decoded = decode_passages(data)
    assert decoded is None or encode_passages(decoded) == data


# The file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search" / "cache.sqlite"


def value(seed: object, size: int = 2048) -> bytes:
    return random.Random(repr(seed)).randbytes(size)


def holds(cache: DiskCache, count: int, namespace: str = "n") -> list[int]:
    """The values of ``0..count`` it holds, verified."""
    found = cache.get_many(namespace, [f"key {number}" for number in range(count)])
    assert all(found[key] == value(int(key.split()[1])) for key in found)
    return sorted(int(key.split()[1]) for key in found)


def fill(cache: DiskCache, numbers: range, namespace: str = "n") -> None:
    for number in numbers:
        cache.put_many(namespace, {f"key {number}": value(number)})


def asides(path: Path) -> list[Path]:
    return [found for found in path.parent.glob("*.aside-*") if not found.name.endswith(("-wal", "-shm"))]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_values_outlive_the_object_and_namespaces_do_not_meet(path: Path) -> None:
    cache = DiskCache(path)
    texts = ["who?", "", "\ud800 alone", "é", "e\u0301"]
    cache.put_many("one", {text: f"1{number}".encode() for number, text in enumerate(texts)})
    cache.put_many("two", {"who?": b""})
    cache.put_many("on", {"ewho?": b"joined otherwise"})
    cache.put_many("two", {})
    cache.close()
    again = DiskCache(path)
    assert again.get_many("one", [*texts, "who?", "missing"]) == {
        text: f"1{number}".encode() for number, text in enumerate(texts)
    }
    assert again.get_many("two", ["who?", "é"]) == {"who?": b""}
    assert again.get_many("two", []) == {}
    again.put_many("one", {"who?": b"another"})
    assert again.get_many("one", ["who?"]) == {"who?": b"another"}
    again.close()


def test_more_keys_at_once_than_one_statement_takes(path: Path) -> None:
    cache = DiskCache(path)
    items = {f"key {number}": f"{number}".encode() for number in range(40_000)}
    cache.put_many("n", items)
    assert cache.get_many("n", list(items)) == items
    cache.close()


def test_no_text_that_was_asked_for_lies_in_the_folder(path: Path) -> None:
    cache = DiskCache(path)
    cache.put_many("a namespace", {"an unmistakable query": b"its value"})
    everything = b"".join(found.read_bytes() for found in path.parent.iterdir())
    assert b"its value" in everything
    assert b"unmistakable" not in everything
    assert b"a namespace" not in everything
    cache.close()


def test_nothing_is_touched_before_the_first_call(path: Path) -> None:
    DiskCache(path).close()
    assert not path.parent.exists()
    with pytest.raises(ConfigurationError, match="max_bytes"):
        DiskCache(path, max_bytes=MEBIBYTE - 1)


def test_what_was_put_first_goes_first_and_the_file_stays_within_its_bound(path: Path) -> None:
    cache = DiskCache(path, max_bytes=MEBIBYTE)
    fill(cache, range(300))
    assert holds(cache, 300) == list(range(300))
    put_again = range(0, 300, 3)
    fill(cache, put_again)
    fill(cache, range(300, 550))
    left = set(holds(cache, 550))
    assert left >= {*put_again, *range(300, 550)}
    gone = set(range(550)) - left
    assert 50 < len(gone) < 200
    assert gone == set(sorted(set(range(300)) - set(put_again))[: len(gone)])
    fill(cache, range(550, 3000))
    cache.close()
    assert path.stat().st_size <= MEBIBYTE
    # Pages waste about a tenth: a 16 KB page holds 7 values of 2 KB.
    assert len(holds(cache, 3000)) > 0.75 * MEBIBYTE / 2048
    cache.close()


def test_a_file_of_an_earlier_format_is_begun_anew(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(path)
    fill(cache, range(1000))
    cache.close()
    other = sqlite3.connect(path, isolation_level=None)  # as a process of an earlier version has it open
    other.execute("CREATE TABLE uses (id INTEGER PRIMARY KEY, used INTEGER NOT NULL)")
    other.execute("PRAGMA user_version = 1")
    cache = DiskCache(path)
    assert holds(cache, 3) == []
    fill(cache, range(1))
    assert holds(cache, 3) == [0]
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < MEBIBYTE
    assert other.execute("SELECT count(*) FROM entries").fetchone() == (1000,)
    other.close()
    assert holds(cache, 3) == [0]
    assert asides(path) == []
    assert warnings_of(caplog) == []
    cache.close()


def test_a_smaller_bound_than_before_makes_the_file_smaller(path: Path) -> None:
    cache = DiskCache(path, max_bytes=8 * MEBIBYTE)
    fill(cache, range(2000))
    cache.close()
    assert path.stat().st_size > 4 * MEBIBYTE
    cache = DiskCache(path, max_bytes=2 * MEBIBYTE)
    fill(cache, range(2000, 2001))
    cache.close()
    assert path.stat().st_size <= 2 * MEBIBYTE
    assert 2000 in holds(cache, 2001)
    cache.close()


def test_large_values_put_together_do_not_swell_the_log(path: Path) -> None:
    cache = DiskCache(path, 64 * MEBIBYTE)
    cache.put_many("n", {f"key {number}": value(number, 6 * MEBIBYTE) for number in range(8)})
    assert path.with_name(f"{path.name}-wal").stat().st_size <= 16 * MEBIBYTE
    cache.close()


def test_a_value_larger_than_a_tenth_of_the_bound_is_not_kept_and_costs_no_other(path: Path) -> None:
    cache = DiskCache(path, max_bytes=MEBIBYTE)
    cache.put_many("n", {"key 0": value(0), "large": bytes(MEBIBYTE), "key 1": value(1)})
    assert cache.get_many("n", ["large"]) == {}
    assert holds(cache, 2) == [0, 1]
    cache.close()


# Several processes

WORKER = """
import random, sys, types

# The packages without what their __init__ imports, which takes seconds.
for name in ("searchr1_async", "searchr1_async.search"):
    package = types.ModuleType(name)
    package.__path__ = [sys.argv[1] + "/" + name.replace(".", "/")]
    sys.modules[name] = package
from searchr1_async.search.cache import DiskCache

path, worker, rounds, max_bytes, keys_in_all = sys.argv[2], sys.argv[3], *map(int, sys.argv[4:])
cache = DiskCache(path, max_bytes)
generator = random.Random(worker)
print("ready", flush=True)
sys.stdin.readline()
hits = 0
for number in range(rounds):
    keys = list({generator.randrange(keys_in_all) for _ in range(10)})
    values = {f"key {key}": random.Random(repr(key)).randbytes(2048) for key in keys}
    found = cache.get_many("n", list(values))
    assert all(values[key] == value for key, value in found.items())
    hits += len(found) / len(keys)
    cache.put_many("n", {key: value for key, value in values.items() if key not in found})
    print(number, flush=True)
cache.close()
print(hits, flush=True)
"""


def start_worker(path: Path, name: str, rounds: int, *, max_bytes: int = 2 << 30, keys: int = 300) -> Popen[str]:
    root = Path(searchr1_async.__file__).parent.parent
    settings = [str(setting) for setting in (root, path, name, rounds, max_bytes, keys)]
    return Popen([sys.executable, "-c", WORKER, *settings], stdin=PIPE, stdout=PIPE, text=True)


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


def test_processes_share_one_file_from_its_making_on(path: Path) -> None:
    workers = [start_worker(path, str(number), 100) for number in range(3)]
    let_go(workers)
    hits = finish(workers)
    # Of 100 rounds, a lone worker would hit 71; together they hit 87.
    assert sum(hits) > 3 * 80
    assert asides(path) == []
    cache = DiskCache(path)
    assert len(holds(cache, 300)) == 300
    cache.close()


def test_processes_that_write_more_than_the_bound_keep_to_it_together(path: Path) -> None:
    workers = [start_worker(path, str(number), 150, max_bytes=MEBIBYTE, keys=100_000) for number in range(2)]
    let_go(workers)
    finish(workers)
    assert path.stat().st_size <= MEBIBYTE
    assert asides(path) == []
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("SELECT count(*) FROM entries").fetchone()[0] > 300
    connection.close()


def test_threads_may_call_at_once(path: Path) -> None:
    cache = DiskCache(path)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            fill(cache, range(number, 200, 4))
            holds(cache, 200)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert holds(cache, 200) == list(range(200))
    cache.close()


@pytest.mark.parametrize("after_rounds", [1, 40, 130])
def test_a_process_killed_while_it_writes_leaves_what_it_had_written(path: Path, after_rounds: int) -> None:
    worker = start_worker(path, "killed", 100_000, max_bytes=MEBIBYTE, keys=100_000)
    let_go([worker])
    assert worker.stdout is not None
    for _ in range(after_rounds):
        worker.stdout.readline()
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    cache = DiskCache(path, max_bytes=MEBIBYTE)
    generator = random.Random("killed")
    written = [{generator.randrange(100_000) for _ in range(10)} for _ in range(after_rounds)]
    for numbers in written[-10:]:
        assert set(cache.get_many("n", [f"key {number}" for number in numbers])) == {
            f"key {number}" for number in numbers
        }
    fill(cache, range(5))
    assert holds(cache, 5) == list(range(5))
    assert asides(path) == []
    cache.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_while_another_writes_for_long_reading_goes_on_and_a_put_is_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk_cache, "_BUSY_SECONDS", 0.01)
    cache = DiskCache(path)
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


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"notes of the user, not a database\n" * 1000),
        lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(5000)),
        lambda path: make_foreign(path),
    ],
    ids=["text", "broken header", "another program's database"],
)
def test_a_foreign_file_is_put_aside_whole_and_a_new_one_begun(
    path: Path, make: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    make(path)
    before = path.read_bytes()
    cache = DiskCache(path)
    fill(cache, range(3))
    assert holds(cache, 3) == [0, 1, 2]
    (aside,) = asides(path)
    assert aside.read_bytes() == before
    (warning,) = warnings_of(caplog)
    assert aside.name in warning
    cache.close()


def make_foreign(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE accounts (name TEXT)")
    connection.commit()
    connection.close()


def test_an_empty_file_is_no_damage(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.touch()
    cache = DiskCache(path)
    fill(cache, range(3))
    assert holds(cache, 3) == [0, 1, 2]
    assert asides(path) == []
    assert warnings_of(caplog) == []
    cache.close()


@pytest.mark.parametrize("seed", range(6))
def test_bytes_changed_anywhere_give_misses_and_never_another_value(path: Path, seed: int) -> None:
    cache = DiskCache(path)
    fill(cache, range(100))
    cache.close()
    generator = random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(1 + 40 * (seed % 3)):
        at = generator.randrange(len(content))
        content[at : at + 16] = generator.randbytes(16)
    path.write_bytes(content)
    holds(cache, 100)  # verifies each value
    fill(cache, range(100, 110))
    if asides(path) == []:  # SQLite does not detect damaged values
        assert set(range(100, 110)) <= set(holds(cache, 110))
    fill(cache, range(10))
    assert set(range(10)) <= set(holds(cache, 10))
    cache.close()


def test_a_file_damaged_while_it_is_open_is_begun_anew_once_by_all_who_use_it(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caches = [DiskCache(path), DiskCache(path)]
    for cache in caches:
        fill(cache, range(50))
    for cache in caches:
        holds(cache, 50)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with path.open("r+b") as file:
        file.write(os.urandom(path.stat().st_size))
    for cache in caches:
        holds(cache, 50)
        fill(cache, range(50, 60))
    for cache in caches:
        assert holds(cache, 60) == list(range(50, 60))
        cache.close()
    assert len(asides(path)) == 1
    assert len(warnings_of(caplog)) == 1


def test_the_log_of_a_damaged_file_is_not_taken_for_the_new_ones(path: Path, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "whole" / path.name)
    fill(cache, range(50))
    connection = sqlite3.connect(cache.path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    fill(cache, range(50, 60))
    path.parent.mkdir()
    for suffix in ("", "-wal"):  # as after a kill
        shutil.copy(f"{cache.path}{suffix}", f"{path}{suffix}")
    cache.close()
    with path.open("r+b") as file:
        file.write(os.urandom(path.stat().st_size))
    cache = DiskCache(path)
    holds(cache, 60)
    fill(cache, range(70, 80))
    assert holds(cache, 80) == list(range(70, 80))
    cache.close()
    assert len(asides(path)) == 1
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_a_folder_deleted_while_it_is_used_is_made_anew(path: Path) -> None:
    cache = DiskCache(path)
    fill(cache, range(3))
    shutil.rmtree(path.parent)
    assert holds(cache, 3) == []
    fill(cache, range(3, 5))
    assert holds(cache, 5) == [3, 4]
    cache.close()


def test_a_newer_format_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(path)
    fill(cache, range(3))
    cache.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 1000")
    connection.close()
    before = path.read_bytes()
    cache = DiskCache(path)
    fill(cache, range(3))
    assert holds(cache, 3) == []
    cache.close()
    assert path.read_bytes() == before
    (warning,) = warnings_of(caplog)
    assert "newer version" in warning


@pytest.mark.parametrize("place", ["a folder", "below a file", "in a folder that may not be written"])
def test_where_no_file_can_be_the_run_goes_on_without_and_one_warning_says_so(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.sqlite"
    if place == "a folder":
        path.mkdir()
    elif place == "below a file":
        path.touch()
        path = path / "cache.sqlite"
    elif os.geteuid() == 0:
        path = Path("/proc/searchr1/cache.sqlite")  # root can write to nearly any folder
    else:
        tmp_path.chmod(0o500)
    cache = DiskCache(path)
    for _ in range(2):
        fill(cache, range(3))
        assert holds(cache, 3) == []
    cache.close()
    (warning,) = warnings_of(caplog)
    assert "continues without it" in warning


FULL_DISK = """
import logging, resource, signal, sys, types
for name in ("searchr1_async", "searchr1_async.search"):
    package = types.ModuleType(name)
    package.__path__ = [sys.argv[1] + "/" + name.replace(".", "/")]
    sys.modules[name] = package
from searchr1_async.search.cache import DiskCache

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = DiskCache(sys.argv[2])
cache.put_many("n", {"early": b"value"})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for number in range(100):
    cache.put_many("n", {f"{number}/{part}": bytes([number]) * 2048 for part in range(10)})
found = cache.get_many("n", ["early", "0/0", "99/9"])
print(sorted(found), found["early"])
cache.close()
"""


def test_on_a_full_disk_what_is_there_is_read_and_one_warning_is_given(path: Path) -> None:
    root = Path(searchr1_async.__file__).parent.parent
    command = [sys.executable, "-c", FULL_DISK, str(root), str(path)]
    ended = run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    warning, found = ended.stdout.splitlines()
    assert warning.startswith("WARNING the cache")
    assert "now read-only" in warning
    assert found == "['0/0', 'early'] b'value'"
    cache = DiskCache(path)
    fill(cache, range(3))
    assert holds(cache, 3) == [0, 1, 2]
    assert cache.get_many("n", ["early"]) == {"early": b"value"}
    cache.close()
