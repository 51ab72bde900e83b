"""A file-backed byte cache shared by several processes. Safe to lose at any time.

An in-memory LRU cache, and the encoding of cached passages.

Cache of answers, in memory and optionally on disk.
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
from searchr1_async.boundary.waits import OwnThread
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError

__all__ = ["DiskCache", "LeastRecentlyUsed", "decode_passages", "encode_passages"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MIN_BYTES = 1 << 20
"""Smallest bound of a :class:`DiskCache`: below it SQLite's own pages outweigh the values."""

_APPLICATION_ID = 0x53523143
"""SQLite's application id of the file; "SR1C"."""
_FORMAT = 1
_PAGE_BYTES = 16_384
"""A vector of 768 float32 takes 3 KB, so SQLite's default pages of 4 KB would waste a quarter."""
_BUSY_SECONDS = 5.0
_TRANSACTION_BYTES = 1 << 20
"""Of values per transaction: bounds the log and how long other processes wait."""
_LOG_BYTES = 16 << 20
_KEPT_OF_BOUND = 0.95
"""Eviction goes below the bound, so that not every put evicts."""
_MAX_TOUCHED = 5_000
_KEYS_PER_QUERY = 500

# Access times have their own table: beside the values, each update would rewrite a page of 16 KB. It needs no index,
# since eviction, the only reader, is rare.
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
    """A file-backed byte cache for any number of processes on one machine.

    All calls block: run them in :class:`~searchr1_async.boundary.waits.OwnThread`. Thread-safe; calls are serialized. The
    file is opened on first use.

    Evicts the least recently used entries. Keys are stored as hashes, so the file contains no queries; values are stored as
    they are. A value that was corrupted on disk is a miss.

    Disk errors never raise; each logs one warning. A damaged or foreign file is renamed to ``<name>.aside-<time>`` and
    replaced. On a full disk the cache becomes read-only. If it can neither read nor write, or finds a newer format, it
    behaves as an empty cache.

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
        self._path = absolute_path(path, "path of a cache")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._touched: dict[int, int] = {}
        """Access times by entry, written in bulk because a write per read would slow down reading."""
        self._reads = self._writes = True

    @property
    def path(self) -> Path:
        return self._path

    def get_many(self, namespace: str, keys: Sequence[str]) -> dict[str, bytes]:
        """The cached values of ``keys``. ``namespace`` (e.g. an embedder's fingerprint) separates equal keys."""
        by_hash = dict(zip(_hashes(namespace, keys), keys, strict=True))
        if not by_hash:
            return {}
        found = self._attempt(lambda connection: self._read(connection, list(by_hash)), {})
        return {by_hash[hashed]: value for hashed, value in found.items()}

    def put_many(self, namespace: str, items: Mapping[str, bytes]) -> None:
        """Stores values and evicts old ones. Values larger than a tenth of the bound are skipped."""
        hashed = zip(_hashes(namespace, items), items.values(), strict=True)
        rows = [(key, value) for key, value in hashed if len(value) <= self._max_bytes // 10]
        for part in _parts(rows, min(_TRANSACTION_BYTES, self._max_bytes // 10)):
            if not self._writes:
                return
            self._attempt(lambda connection, part=part: self._write(connection, part), None)

    def close(self) -> None:
        """Closes the file; the next call reopens it."""
        with self._lock:
            if self._connection is not None:
                with suppress(sqlite3.Error):
                    self._flush(self._connection)
            self._disconnect()

    # Reading and writing

    def _read(self, connection: sqlite3.Connection, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        now = time.time_ns()
        for start in range(0, len(hashes), _KEYS_PER_QUERY):
            part = hashes[start : start + _KEYS_PER_QUERY]
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
            # Shrinks a file whose bound was lowered; otherwise freed pages are reused.
            # The pragma returns a row per page, and `execute` would stop at the first one.
            connection.executescript(f"PRAGMA incremental_vacuum({excess})")

    def _flush(self, connection: sqlite3.Connection) -> None:
        """Writes the access times. Losing them costs little."""
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
        """Deletes the least recently used entries; repeats while partly filled pages keep it above the bound."""
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

    # Disk errors

    def _attempt(self, action: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """Returns the action's result, or ``otherwise`` on a disk error."""
        with self._lock:
            for _ in range(2):
                if not self._reads:
                    return otherwise
                try:
                    return action(self._connected())
                except _NewerFormat:
                    self._give_up("was written by a newer version of this package and is not touched")
                except (OSError, Timeout) as error:
                    self._give_up(f"cannot be used ({type(error).__name__}: {_reason(error)})")
                except sqlite3.Error as error:
                    code = _code(error)
                    if code in _BUSY:  # another process is in a long write: skip the cache this time
                        logger.debug("the cache %s was busy for %g s", self._path, _BUSY_SECONDS)
                        return otherwise
                    if self._connection is None:
                        self._give_up(f"cannot be opened ({error})")
                    elif code in _DAMAGED:
                        self._replace_damaged(error)
                    else:
                        self._stop_writing(error)
                        return otherwise
            return otherwise

    def _stop_writing(self, error: sqlite3.Error) -> None:
        """Turns read-only, or gives up if it already was."""
        if not self._writes:
            self._give_up(f"can no longer be read ({error})")
            return
        self._writes = False
        logger.warning(
            "the cache %s is now read-only (%s); the run continues with its current content", self._path, error
        )

    def _give_up(self, reason: str) -> None:
        self._disconnect()
        self._reads = self._writes = False
        logger.warning("the cache %s %s; the run continues without it", self._path, reason)

    def _replace_damaged(self, error: sqlite3.Error) -> None:
        """Sets the damaged file aside unless another process did; the next attempt creates a new one."""
        damaged = self._identity
        self._disconnect()
        try:
            with self._opening():
                if damaged == _identity(self._path):
                    self._put_aside(f"is damaged ({error})")
        except (OSError, Timeout) as failure:
            self._give_up(f"is damaged and cannot be renamed ({_reason(failure)})")

    def _put_aside(self, reason: str) -> None:
        """Renames the file and its log; call within :meth:`_opening`."""
        aside = self._path.with_name(f"{self._path.name}.aside-{time.time_ns()}")
        for suffix in ("-wal", "-shm", ""):
            with suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(aside.with_name(aside.name + suffix))
        logger.warning(
            "the cache %s %s: renamed to %s and replaced by a new one; the renamed file can be deleted",
            self._path,
            reason,
            aside.name,
        )

    # Opening and closing

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity != _identity(self._path):
            self._disconnect()  # renamed by another process, or deleted
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._opening():
                self._identity = _identity(self._path)
                try:
                    self._connection = self._open()
                except sqlite3.Error as error:
                    if _code(error) not in _DAMAGED:
                        raise
                    self._put_aside(f"is damaged or not a cache ({error})")
                    self._connection = self._open()
                self._identity = _identity(self._path)
        return self._connection

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Only one process at a time creates the file or sets it aside."""
        with FileLock(f"{self._path}.lock", timeout=6 * _BUSY_SECONDS):
            yield

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.text_factory = bytes  # a flipped bit can turn a blob into text, which would raise on decoding
        try:
            owner, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
            is_new = not owner and not connection.execute("SELECT 1 FROM sqlite_master").fetchone()
            if not is_new and owner != _APPLICATION_ID:
                raise _Foreign("file is a database of another application")
            if version > _FORMAT:
                raise _NewerFormat
            if is_new:
                connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            # In WAL mode readers and the writer do not block each other. A power failure may lose the last writes, a
            # killed process loses none.
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
    """A healthy database of another application."""

    sqlite_errorcode = sqlite3.SQLITE_NOTADB


_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR}
"""Error codes of a damaged file; the last is "no such table"."""
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary code; 0 for errors of Python's module."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _bytes_in_use(connection: sqlite3.Connection) -> int:
    """Bytes of all pages in use."""
    pages = _pragma(connection, "page_count") - _pragma(connection, "freelist_count")
    return pages * _pragma(connection, "page_size")


def _touch(connection: sqlite3.Connection, touched: Mapping[int, int]) -> None:
    """Sets access times; entries evicted meanwhile are ignored."""
    connection.executemany(
        "UPDATE uses SET used = ? WHERE id = ?", [(used, number) for number, used in touched.items()]
    )


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


def _parts(rows: Sequence[tuple[bytes, bytes]], max_bytes: int) -> Iterator[list[tuple[bytes, bytes]]]:
    """Splits rows into transactions of bounded size."""
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


Key = TypeVar("Key")
Value = TypeVar("Value")

_PASSAGES_VERSION = 1
_HEAD = struct.Struct("<BI")
_PASSAGE = struct.Struct("<dIII")


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


Answer = tuple[Passage, ...]
AnswerKey = tuple[str, int]
"""A cleaned query and the number of passages."""


class AnswerCache:
    """Answers by query, each valid for one index state. ``max_entries`` bounds the LRU in memory (about 3 KB per answer of
    three passages), ``max_bytes`` the optional disk cache at ``path``, which processes may share.
    """

    def __init__(self, max_entries: int, path: Path | None = None, max_bytes: int = 1 << 30) -> None:
        self._memory: LeastRecentlyUsed[tuple[str, AnswerKey], Answer] = LeastRecentlyUsed(max_entries)
        self._disk = None if path is None else DiskCache(path, max_bytes=max_bytes)
        self._thread = OwnThread("searchr1-cache")

    @property
    def is_on_disk(self) -> bool:
        return self._disk is not None

    def recall(self, index: str, keys: Iterable[AnswerKey]) -> dict[AnswerKey, Answer]:
        """Answers from memory. ``index`` identifies everything an answer depends on besides its key."""
        found = {key: self._memory.get((index, key)) for key in keys}
        return {key: answer for key, answer in found.items() if answer is not None}

    async def look_up(self, index: str, keys: Iterable[AnswerKey]) -> dict[AnswerKey, Answer]:
        """Answers from disk, which are then also kept in memory."""
        if self._disk is None:
            return {}
        by_text = {_disk_key(key): key for key in keys}
        values = await self._thread.run(self._disk.get_many, _namespace(index), list(by_text))
        found: dict[AnswerKey, Answer] = {}
        for text, value in values.items():
            if (answer := decode_passages(value)) is not None:
                found[by_text[text]] = answer
                self._memory.put((index, by_text[text]), answer)
        return found

    def remember(self, index: str, answers: Mapping[AnswerKey, Answer]) -> None:
        """Stores answers in memory."""
        for key, answer in answers.items():
            self._memory.put((index, key), answer)

    async def keep(self, index: str, answers: Mapping[AnswerKey, Answer]) -> None:
        """Stores answers on disk."""
        if self._disk is not None and answers:
            encoded = {_disk_key(key): encode_passages(answer) for key, answer in answers.items()}
            await self._thread.run(self._disk.put_many, _namespace(index), encoded)

    async def aclose(self) -> None:
        """Releases the file and the thread; the memory cache stays."""
        if self._disk is not None:
            await self._thread.run(self._disk.close)
        self._thread.close()


def _disk_key(key: AnswerKey) -> str:
    text, n_results = key
    return f"{n_results}\0{text}"


def _namespace(index: str) -> str:
    return hashlib.sha256(index.encode("utf-8", "surrogatepass")).hexdigest()[:32]
