"""Bytes by key in one file, for several processes at once and for later ones: a cache, which may always be lost."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.errors import ConfigurationError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MIN_BYTES = 1 << 20
"""The smallest bound of a :class:`DiskCache`: below it SQLite's own pages count for more than the values."""

_APPLICATION_ID = 0x53523143
"""SQLite's mark of whose file it is; "SR1C"."""
_FORMAT = 1
_PAGE_BYTES = 16_384
"""A vector of 768 float32 takes 3 KB: SQLite's pages of 4 KB would hold one each and waste a quarter."""
_BUSY_SECONDS = 5.0
_TRANSACTION_BYTES = 1 << 20
"""Of values. Each touches a page of the index as well, so the log grows to some 6 MB, and other processes wait 20 ms."""
_LOG_BYTES = 16 << 20
_KEPT_OF_BOUND = 0.95
"""Evicting goes below the bound, so that not every put has to."""
_MAX_TOUCHED = 5_000  # takes 75 ms to write
_KEYS_A_QUERY = 500

# The times of use have a table of their own: in the one with the values each would rewrite a page of 16 KB. It has no
# index: evicting 5 % at a time affords to sort it.
_TABLES = (
    "CREATE TABLE entries (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, checksum INTEGER NOT NULL, value BLOB NOT NULL)",
    "CREATE TABLE uses (id INTEGER PRIMARY KEY, used INTEGER NOT NULL)",
)
_PUT = """
INSERT INTO entries (key, checksum, value) VALUES (?, ?, ?)
ON CONFLICT (key) DO UPDATE SET checksum = excluded.checksum, value = excluded.value
"""
_USED = "INSERT OR REPLACE INTO uses (id, used) SELECT id, ? FROM entries WHERE key = ?"


class DiskCache:
    """Bytes by key in one file, for any number of processes of one machine at once, and for later ones.

    Every call blocks: make them in a thread of its own (:class:`~searchr1_async.search.threads.OwnThread`). Calls from
    several threads run one after another. The file is opened by the first call.

    It is bounded: what was used least recently goes first. Keys are stored as hashes, so no text that was asked for
    lies in the file; values lie there as they are. A value that changed on the disk is a miss.

    It never raises for the disk's sake. A file that is damaged, or was never such a cache, is put aside
    (``<name>.aside-<time>``) and begun anew. On a full disk it goes on reading and stops writing; where it can neither
    read nor write, or finds a newer format than its own, it goes on as an empty cache. Each is one warning in the log.

    Among 20,000 values of 2 KB, on a local disk: ``get_many`` of 100 keys takes 1.4 ms, ``put_many`` of 100 values 2.5 ms
    (15 ms when the log is carried over into the file); among 200,000, 2 and 4 ms.

    Args:
        path: the file; its folder is made when needed. SQLite's ``-wal`` and ``-shm`` and a ``.lock`` lie beside it. It
            must not be on a network file system that several machines write to.
        max_bytes: of the file; at least 1 MiB. The write-ahead log comes on top, about 16 MiB at most.

    Raises:
        ConfigurationError: ``max_bytes`` below its minimum.
    """

    def __init__(self, path: str | Path, max_bytes: int = 2 << 30) -> None:
        if max_bytes < MIN_BYTES:
            raise ConfigurationError(f"max_bytes of a cache is {max_bytes}: give at least {MIN_BYTES:,}")
        self._path = absolute_path(path, "path of a cache")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._touched: dict[int, int] = {}
        """When entries were read: written in bulk, for a write at each read would make reading slow."""
        self._reads = self._writes = True

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def get_many(self, namespace: str, keys: Sequence[str]) -> dict[str, bytes]:
        """The values of those keys that it holds.

        Args:
            namespace: what the values mean (an embedder's fingerprint, say); equal keys of two namespaces do not meet.
            keys: in any order, doubles allowed.
        """
        by_hash = dict(zip(_hashes(namespace, keys), keys, strict=True))
        if not by_hash:
            return {}
        found = self._attempt(lambda connection: self._read(connection, list(by_hash)), {})
        return {by_hash[hashed]: value for hashed, value in found.items()}

    def put_many(self, namespace: str, items: Mapping[str, bytes]) -> None:
        """Keeps values, in place of those with equal keys, and makes room for them.

        Args:
            namespace: see :meth:`get_many`.
            items: a value that is larger than a tenth of the bound is not kept.
        """
        hashed = zip(_hashes(namespace, items), items.values(), strict=True)
        rows = [(key, value) for key, value in hashed if len(value) <= self._max_bytes // 10]
        for part in _parts(rows, min(_TRANSACTION_BYTES, self._max_bytes // 10)):
            if not self._writes:
                return
            self._attempt(lambda connection, part=part: self._write(connection, part), None)

    def close(self) -> None:
        """Lets go of the file; the next call opens it again."""
        with self._lock:
            if self._connection is not None:
                with suppress(sqlite3.Error):
                    self._flush(self._connection)
            self._disconnect()

    # Reading and writing

    def _read(self, connection: sqlite3.Connection, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        now = time.time_ns()
        for start in range(0, len(hashes), _KEYS_A_QUERY):
            part = hashes[start : start + _KEYS_A_QUERY]
            marks = ",".join("?" * len(part))
            rows = connection.execute(f"SELECT id, key, checksum, value FROM entries WHERE key IN ({marks})", part)
            for number, key, checksum, value in rows:
                if isinstance(value, bytes) and checksum == _checksum(key, value):
                    found[key] = value
                    self._touched[number] = now
        if len(self._touched) >= _MAX_TOUCHED:
            self._flush(connection)
        return found

    def _write(self, connection: sqlite3.Connection, rows: Sequence[tuple[bytes, bytes]]) -> None:
        now = time.time_ns()
        with _transaction(connection):
            connection.executemany(_PUT, [(key, _checksum(key, value), value) for key, value in rows])
            connection.executemany(_USED, [(now, key) for key, _ in rows])
            if _bytes_in_use(connection) > self._max_bytes:
                self._evict(connection)
        if (excess := _pragma(connection, "page_count") - self._max_bytes // _pragma(connection, "page_size")) > 0:
            # Freed pages stay in the file for reuse; this matters where the bound was larger once.
            # It gives a row without columns for each page, at the first of which `execute` would stop.
            connection.executescript(f"PRAGMA incremental_vacuum({excess})")

    def _flush(self, connection: sqlite3.Connection) -> None:
        """Writes the times of use; those that cannot be written are lost, which costs little."""
        touched, self._touched = self._touched, {}
        try:
            if self._writes and touched:
                with _transaction(connection):
                    _touch(connection, touched)
        except sqlite3.Error as error:
            if _code(error) in _DAMAGED:
                raise
            if _code(error) not in _BUSY:
                self._stop_writing(error)

    def _evict(self, connection: sqlite3.Connection) -> None:
        """Deletes the longest unused; once more while pages that are not empty yet keep it above the bound."""
        touched, self._touched = self._touched, {}
        _touch(connection, touched)
        target = int(self._max_bytes * _KEPT_OF_BOUND)
        while (in_use := _bytes_in_use(connection)) > target:
            entries = connection.execute("SELECT count(*) FROM uses").fetchone()[0]
            if not entries:
                return
            number = max(1, int(entries * (1 - target / in_use)))
            old = connection.execute("SELECT id FROM uses ORDER BY used, id LIMIT ?", (number,)).fetchall()
            connection.executemany("DELETE FROM entries WHERE id = ?", old)
            connection.executemany("DELETE FROM uses WHERE id = ?", old)

    # What may go wrong

    def _attempt(self, action: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """What the action returns; ``otherwise`` where the disk does not let it."""
        with self._lock:
            for _ in range(2):
                if not self._reads:
                    return otherwise
                try:
                    return action(self._connected())
                except _NewerFormat:
                    self._give_up("was written by a newer version of this package: it is left alone")
                except (OSError, Timeout) as error:
                    self._give_up(f"cannot be used ({type(error).__name__}: {_reason(error)})")
                except sqlite3.Error as error:
                    code = _code(error)
                    if code in _BUSY:  # another process writes for long: this once goes without
                        logger.debug("the cache %s was busy for %g s", self._path, _BUSY_SECONDS)
                        return otherwise
                    if self._connection is None:
                        self._give_up(f"cannot be opened ({error})")
                    elif code in _DAMAGED:
                        self._begin_anew(error)
                    else:
                        self._stop_writing(error)
                        return otherwise
            return otherwise

    def _stop_writing(self, error: sqlite3.Error) -> None:
        """A full disk lets what is there be read; should that fail as well, it is the end."""
        if not self._writes:
            self._give_up(f"can be read no more ({error})")
            return
        self._writes = False
        logger.warning("the cache %s takes nothing more (%s): the run goes on with what it holds", self._path, error)

    def _give_up(self, reason: str) -> None:
        self._disconnect()
        self._reads = self._writes = False
        logger.warning("the cache %s %s: the run goes on without it", self._path, reason)

    def _begin_anew(self, error: sqlite3.Error) -> None:
        """Puts the damaged file aside, unless another process did so already; the next attempt makes a new one."""
        damaged = self._identity
        self._disconnect()
        try:
            with self._opening():
                if damaged == _identity(self._path):
                    self._put_aside(f"is damaged ({error})")
        except (OSError, Timeout) as failure:
            self._give_up(f"is damaged and cannot be put aside ({_reason(failure)})")

    def _put_aside(self, reason: str) -> None:
        """Renames it, with the log that belongs to it; within :meth:`_opening`."""
        aside = self._path.with_name(f"{self._path.name}.aside-{time.time_ns()}")
        for suffix in ("-wal", "-shm", ""):
            with suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(aside.with_name(aside.name + suffix))
        logger.warning(
            "the cache %s %s: it was renamed to %s and is begun anew; delete that if you do not miss anything",
            self._path,
            reason,
            aside.name,
        )

    # Opening and closing

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity != _identity(self._path):
            self._disconnect()  # put aside by another process, or deleted
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._opening():
                self._identity = _identity(self._path)
                try:
                    self._connection = self._open()
                except sqlite3.Error as error:
                    if _code(error) not in _DAMAGED:
                        raise
                    self._put_aside(f"is damaged, or was never a cache ({error})")
                    self._connection = self._open()
                self._identity = _identity(self._path)
        return self._connection

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """One process at a time makes the file or puts it aside."""
        with FileLock(f"{self._path}.lock", timeout=6 * _BUSY_SECONDS):
            yield

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.text_factory = bytes  # a flipped bit can make a text of a value, and decoding would raise
        try:
            owner, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
            is_new = not owner and not connection.execute("SELECT 1 FROM sqlite_master").fetchone()
            if not is_new and owner != _APPLICATION_ID:
                raise _Foreign("file is a database of something else")
            if version > _FORMAT:
                raise _NewerFormat
            if is_new:
                connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            # With a write-ahead log readers and a writer do not wait for one another. It loses the last writes when the
            # machine loses power, and none when the process dies.
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_BYTES // 4 // _PAGE_BYTES}")
            connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}").fetchall()
            if is_new:
                with _transaction(connection):
                    for statement in _TABLES:
                        connection.execute(statement)
                    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    connection.execute(f"PRAGMA user_version = {_FORMAT}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _disconnect(self) -> None:
        connection, self._connection, self._identity = self._connection, None, None
        self._touched.clear()
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()


class _NewerFormat(Exception):
    """The file's format is newer than this code."""


class _Foreign(sqlite3.DatabaseError):
    """A sound database, of something else."""

    sqlite_errorcode = sqlite3.SQLITE_NOTADB


_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR}
"""Codes that say so; the last is "no such table"."""
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary code; 0 for what Python's module raised by itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _bytes_in_use(connection: sqlite3.Connection) -> int:
    """Of pages; those that are not full count whole, as they do on the disk."""
    pages = _pragma(connection, "page_count") - _pragma(connection, "freelist_count")
    return pages * _pragma(connection, "page_size")


def _touch(connection: sqlite3.Connection, touched: Mapping[int, int]) -> None:
    """Entries that were evicted meanwhile have no time of use left to set."""
    connection.executemany(
        "UPDATE uses SET used = ? WHERE id = ?", [(used, number) for number, used in touched.items()]
    )


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    # A transaction that begins by reading cannot wait for another's end when it comes to write.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is, whatever its name; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _hashes(namespace: str, keys: Iterable[str]) -> list[bytes]:
    """128 bits each: that two of a billion keys meet has a chance of 1e-21."""
    person = hashlib.blake2b(namespace.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return [
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16, person=person).digest() for key in keys
    ]


def _checksum(key: bytes, value: bytes) -> int:
    """Of both, so that an index which points to the wrong row is noticed too; SQLite has none of its own."""
    return zlib.crc32(value, zlib.crc32(key))


def _parts(rows: Sequence[tuple[bytes, bytes]], max_bytes: int) -> Iterator[list[tuple[bytes, bytes]]]:
    """The rows in transactions of bounded size."""
    part: list[tuple[bytes, bytes]] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row[1])
        if size >= max_bytes:
            yield part
            part, size = [], 0
    if part:
        yield part
