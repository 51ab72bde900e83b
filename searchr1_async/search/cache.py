"""Caches of the search: the most recently used entries in memory, and bytes in a SQLite file that processes share.

Safe to lose at any time: an entry that is gone or damaged is a miss. Passages are encoded to the last bit.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

from filelock import FileLock, Timeout

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError

logger = logging.getLogger(__name__)

Key = TypeVar("Key")
Value = TypeVar("Value")
Result = TypeVar("Result")

_PASSAGES_VERSION = 1
_HEAD = struct.Struct("<BI")
_PASSAGE = struct.Struct("<dIII")

MIN_BYTES = 1 << 20
"""Smallest bound of a :class:`DiskCache`: below it SQLite's own pages outweigh the values."""
_APPLICATION_ID = 0x53523143
"""SQLite's application id of the file; "SR1C"."""
_FORMAT = 2
_PAGE_BYTES = 16_384
"""A vector of 768 float32 takes 3 KB, so SQLite's default pages of 4 KB would waste a quarter."""
_BUSY_SECONDS = 5.0
_LOG_BYTES = 16 << 20
_KEPT_OF_BOUND = 0.95
"""Pruning goes below the bound, so that not every put prunes."""
_TRANSACTION_BYTES = 1 << 20
"""Of values per transaction: bounds the log and how long other processes wait."""
_KEYS_PER_QUERY = 500
_TABLE = "CREATE TABLE entries (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, checksum INTEGER NOT NULL, value BLOB NOT NULL)"
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR}
"""Error codes of a damaged file; the last is "no such table"."""
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class LeastRecentlyUsed(Generic[Key, Value]):
    """An LRU cache of at most ``max_entries``; 0 disables it. Raises ConfigurationError if negative."""

    def __init__(self, max_entries: int) -> None:
        if max_entries < 0:
            raise ConfigurationError(f"max_entries is {max_entries}: give 0 or more")
        self._max_entries = max_entries
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The key's value, marked as most recently used; None if missing."""
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> None:
        """Stores a value (not None) as the most recently used."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)


def encode_passages(passages: Sequence[Passage]) -> bytes:
    """Lossless encoding, including the score's bits and lone surrogates."""
    parts = [_HEAD.pack(_PASSAGES_VERSION, len(passages))]
    for passage in passages:
        texts = [text.encode("utf-8", "surrogatepass") for text in (passage.id, passage.title, passage.text)]
        parts += (_PASSAGE.pack(passage.score, *map(len, texts)), *texts)
    return b"".join(parts)


def decode_passages(data: bytes) -> tuple[Passage, ...] | None:
    """Inverse of :func:`encode_passages`; None for invalid bytes or another version."""
    try:
        version, count = _HEAD.unpack_from(data)
        if version != _PASSAGES_VERSION:
            return None
        passages: list[Passage] = []
        at = _HEAD.size
        for _ in range(count):
            score, *lengths = _PASSAGE.unpack_from(data, at)
            at += _PASSAGE.size
            texts: list[str] = []
            for length in lengths:
                texts.append(data[at : at + length].decode("utf-8", "surrogatepass"))
                at += length
            passages.append(Passage(texts[0], texts[1], texts[2], score))
    except (struct.error, UnicodeDecodeError):
        return None
    return tuple(passages) if at == len(data) else None


class DiskCache:
    """A file-backed byte cache for any number of processes on one machine. Drops the entries that were put first.

    All calls block: run them in :class:`~searchr1_async.boundary.waits.OwnThread`. Thread-safe; calls are serialized. The
    file is opened on first use. Keys are stored as hashes, so the file contains no queries; values are stored as they are.

    Disk errors never raise; each logs one warning. A damaged or foreign file is renamed to ``<name>.aside-<time>`` and
    replaced; one of an earlier format is deleted. On a full disk the cache becomes read-only. If it can neither read nor
    write, or finds a newer format, it behaves as an empty cache.

    Args:
        path: the file; its folder is created if needed. SQLite's ``-wal`` and ``-shm`` and a ``.lock`` lie beside it. Not
            on a network file system that several machines write to.
        max_bytes: of the file, at least 1 MiB. The write-ahead log adds up to 16 MiB.

    Raises:
        ConfigurationError: ``max_bytes`` is below its minimum.
    """

    def __init__(self, path: str | Path, max_bytes: int = 2 << 30) -> None:
        if max_bytes < MIN_BYTES:
            raise ConfigurationError(f"max_bytes of a cache is {max_bytes}: give at least {MIN_BYTES:,}")
        self.path = absolute_path(path, "path of a cache")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._reads = self._writes = True

    def get_many(self, namespace: str, keys: Sequence[str]) -> dict[str, bytes]:
        """The cached values of ``keys``. ``namespace`` (e.g. an embedder's fingerprint) separates equal keys."""
        by_hash = dict(zip(_hashes(namespace, keys), keys, strict=True))
        if not by_hash:
            return {}
        found = self._attempt(lambda connection: _read(connection, list(by_hash)), {})
        return {by_hash[hashed]: value for hashed, value in found.items()}

    def put_many(self, namespace: str, items: Mapping[str, bytes]) -> None:
        """Stores values and prunes old ones. Values larger than a tenth of the bound are skipped."""
        hashed = zip(_hashes(namespace, items), items.values(), strict=True)
        rows = [(key, _checksum(key, value), value) for key, value in hashed if len(value) <= self._max_bytes // 10]
        largest = max((len(value) for _, _, value in rows), default=0)
        number = max(1, min(_TRANSACTION_BYTES, self._max_bytes // 10) // max(1, largest))
        for start in range(0, len(rows), number):
            if self._writes:
                part = rows[start : start + number]
                self._attempt(lambda connection, part=part: _write(connection, part, self._max_bytes), None)

    def close(self) -> None:
        """Closes the file; the next call reopens it."""
        with self._lock:
            self._disconnect()

    # Disk errors

    def _attempt(self, action: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """Returns the action's result, or ``otherwise`` on a disk error."""
        with self._lock:
            for _ in range(2):
                if not self._reads:
                    break
                try:
                    return action(self._connected())
                except _NewerFormat:
                    self._give_up("was written by a newer version of this package and is not touched")
                except (OSError, Timeout) as error:
                    self._give_up(f"cannot be used ({type(error).__name__}: {_reason(error)})")
                except sqlite3.Error as error:
                    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                    if code in _BUSY:  # another process is in a long write: skip the cache this time
                        break
                    if code in _DAMAGED:
                        self._replace(error)
                    elif self._connection is None or not self._writes:
                        self._give_up(f"cannot be opened or read ({error})")
                    else:
                        self._writes = False
                        logger.warning(
                            "the cache %s is now read-only (%s); the run continues with its current content",
                            self.path,
                            error,
                        )
                        break
            return otherwise

    def _give_up(self, reason: str) -> None:
        self._disconnect()
        self._reads = self._writes = False
        logger.warning("the cache %s %s; the run continues without it", self.path, reason)

    def _replace(self, error: sqlite3.Error) -> None:
        """Renames the damaged file and its log, unless another process did; the next attempt creates a new one."""
        damaged = self._identity
        self._disconnect()
        try:
            with self._alone():
                if damaged != _identity(self.path):
                    return
                aside = self.path.with_name(f"{self.path.name}.aside-{time.time_ns()}")
                for suffix in ("-wal", "-shm", ""):
                    with suppress(FileNotFoundError):
                        self.path.with_name(self.path.name + suffix).rename(aside.with_name(aside.name + suffix))
        except (OSError, Timeout) as failure:
            self._give_up(f"is damaged and cannot be renamed ({_reason(failure)})")
            return
        logger.warning(
            "the cache %s is damaged or not a cache (%s): renamed to %s and replaced by a new one; the renamed file can be "
            "deleted",
            self.path,
            error,
            aside.name,
        )

    # Opening and closing

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity != _identity(self.path):
            self._disconnect()  # renamed by another process, or deleted
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._identity = _identity(self.path)
                self._connection = _open(self.path)
                self._identity = _identity(self.path)
        return self._connection

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process at a time creates the file or sets it aside."""
        with FileLock(f"{self.path}.lock", timeout=6 * _BUSY_SECONDS):
            yield

    def _disconnect(self) -> None:
        connection, self._connection, self._identity = self._connection, None, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()


class _NewerFormat(Exception):
    """The file's format is newer than this code."""


class _Foreign(sqlite3.DatabaseError):
    """A healthy database of another application."""

    sqlite_errorcode = sqlite3.SQLITE_NOTADB


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.text_factory = bytes  # a flipped bit can turn a blob into text, which would raise on decoding
    try:
        owner, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
        if (not owner and connection.execute("SELECT 1 FROM sqlite_master").fetchone()) or owner not in (
            0,
            _APPLICATION_ID,
        ):
            raise _Foreign("file is a database of another application")
        if version > _FORMAT:
            raise _NewerFormat
        if owner and version < _FORMAT:
            # Dropping its tables would write a log of its size, and a process of an earlier version that has it open would
            # find it damaged.
            connection.close()
            for suffix in ("-wal", "-shm", ""):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            return _open(path)
        if not owner:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        # In WAL mode readers and the writer do not block each other. A power failure may lose the last writes, a
        # killed process loses none.
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_BYTES // 4 // _PAGE_BYTES}")
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}").fetchall()
        if not owner:
            with _transaction(connection):
                connection.execute(_TABLE)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_FORMAT}")
    except BaseException:
        connection.close()
        raise
    return connection


def _read(connection: sqlite3.Connection, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for start in range(0, len(hashes), _KEYS_PER_QUERY):
        part = hashes[start : start + _KEYS_PER_QUERY]
        marks = ",".join("?" * len(part))
        for key, checksum, value in connection.execute(
            f"SELECT key, checksum, value FROM entries WHERE key IN ({marks})", part
        ):
            if isinstance(value, bytes) and checksum == _checksum(key, value):
                found[key] = value
    return found


def _write(connection: sqlite3.Connection, rows: Sequence[tuple[bytes, int, bytes]], max_bytes: int) -> None:
    with _transaction(connection):
        connection.executemany("INSERT OR REPLACE INTO entries (key, checksum, value) VALUES (?, ?, ?)", rows)
        if _bytes_in_use(connection) > max_bytes:
            _prune(connection, int(max_bytes * _KEPT_OF_BOUND))
    if (excess := _pragma(connection, "page_count") - max_bytes // _pragma(connection, "page_size")) > 0:
        # Shrinks a file whose bound was lowered; otherwise freed pages are reused.
        # The pragma returns a row per page, and `execute` would stop at the first one.
        connection.executescript(f"PRAGMA incremental_vacuum({excess})")


def _prune(connection: sqlite3.Connection, target: int) -> None:
    """Deletes the entries that were put first; repeats while partly filled pages keep it above the target."""
    while (in_use := _bytes_in_use(connection)) > target:
        entries = connection.execute("SELECT count(*) FROM entries").fetchone()[0]
        if not entries:
            return
        number = max(1, int(entries * (1 - target / in_use)))
        connection.execute("DELETE FROM entries WHERE id IN (SELECT id FROM entries ORDER BY id LIMIT ?)", (number,))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _bytes_in_use(connection: sqlite3.Connection) -> int:
    """Bytes of all pages in use."""
    pages = _pragma(connection, "page_count") - _pragma(connection, "freelist_count")
    return pages * _pragma(connection, "page_size")


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    # IMMEDIATE: a transaction that starts with a read fails instead of waiting when it upgrades to a write.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file; None if it does not exist."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _hashes(namespace: str, keys: Iterable[str]) -> list[bytes]:
    """128-bit hashes: the chance of a collision among a billion keys is 1e-21."""
    person = hashlib.blake2b(namespace.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return [
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16, person=person).digest() for key in keys
    ]


def _checksum(key: bytes, value: bytes) -> int:
    """Covers the key too, to detect an index that points to the wrong row. SQLite has no checksums."""
    return zlib.crc32(value, zlib.crc32(key))
