"""Answers of a search, kept in memory and in a SQLite file that processes share.

An answer has as many passages as were asked for, trimmed to their number of words. One that is gone or damaged is a miss.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import msgspec

from searchr1_async.boundary.waits import OwnThread
from searchr1_async.episodes.types import Passage

logger = logging.getLogger(__name__)

Key = TypeVar("Key")
Value = TypeVar("Value")
Answer = tuple[Passage, ...]

_APPLICATION_ID = 0x53523143
"""SQLite's application id of the file; "SR1C"."""
_FORMAT = 3
_PAGE_BYTES = 16_384
"""An answer of three passages takes about 3 KB, so SQLite's default pages of 4 KB would waste a quarter."""
_BUSY_SECONDS = 5.0
_LOG_BYTES = 16 << 20
_CHECKSUM_BYTES = 4
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_ERRORS = (sqlite3.Error, msgspec.MsgspecError, OSError, ValueError)
"""A ValueError is SQLite's where its message quotes damaged bytes."""
_encoder = msgspec.msgpack.Encoder(enc_hook=float)  # a store's scores may be numpy's
_decoder = msgspec.msgpack.Decoder(Answer)


class AnswerKey(NamedTuple):
    """What an answer depends on besides the index."""

    query: str
    """Cleaned."""
    n_results: int
    max_words: int | None
    """Of each passage; None for whole passages."""


class LeastRecentlyUsed(Generic[Key, Value]):
    """A cache of at most ``max_entries`` values, none of them None; 0 disables it."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)


class AnswerFile:
    """Answers in a file that processes on one machine share. Drops those that were put first.

    All calls block, and must come from one thread. No disk error raises: the first one is logged, and the file is then not used any
    more. A file that is not a cache is left alone. Keys are kept as hashes, so the file contains no queries.

    Args:
        path: the file; its folder is created if needed. Not on a network file system that several machines write to.
        max_bytes: of the file. The write-ahead log adds up to 16 MiB.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._connection: sqlite3.Connection | None = None
        self._is_usable = True

    def get_many(self, index: str, keys: Iterable[AnswerKey]) -> dict[AnswerKey, Answer]:
        """The answers there are. ``index`` identifies everything an answer depends on besides its key."""
        found: dict[AnswerKey, Answer] = {}

        def read(connection: sqlite3.Connection) -> None:
            for key in keys:
                own = _hashed(index, key)
                row = connection.execute("SELECT value FROM answers WHERE key = ?", (own,)).fetchone()
                if row is not None and (answer := _decoded(own, row[0])) is not None:
                    found[key] = answer

        self._use(read)
        return found

    def put_many(self, index: str, answers: Mapping[AnswerKey, Answer]) -> None:
        """Adds answers and drops the oldest beyond the bound."""
        rows = [row for key, answer in answers.items() if (row := _row(_hashed(index, key), answer)) is not None]

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany("INSERT OR REPLACE INTO answers (key, value) VALUES (?, ?)", rows)
                self._prune(connection)

        self._use(write)

    def close(self) -> None:
        """Closes the file; the next call reopens it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _use(self, work: Callable[[sqlite3.Connection], None]) -> None:
        if not self._is_usable:
            return
        try:
            if self._connection is None:
                self._connection = _opened(self._path)
            work(self._connection)
        except _ERRORS as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _BUSY:
                return  # another process is in a long write: this time without the file
            self._is_usable = False
            self.close()
            logger.warning(
                "the cache %s cannot be used (%s): the run continues without it; give another cache_path, or delete the file if it "
                "is a damaged cache",
                self._path,
                error,
            )

    def _prune(self, connection: sqlite3.Connection) -> None:
        """Deletes the answers that were put first, about a tenth at a time."""
        oldest = "DELETE FROM answers WHERE rowid <= (SELECT (9 * min(rowid) + max(rowid)) / 10 FROM answers)"
        while _bytes_in_use(connection) > self._max_bytes:
            if not connection.execute(oldest).rowcount:
                return


def _opened(path: Path) -> sqlite3.Connection:
    """The file's connection; begins a new one or one of an earlier format. Raises OSError if it is no cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # IMMEDIATE: a transaction that starts with a read fails instead of waiting when it upgrades to a write.
    connection = sqlite3.connect(path, _BUSY_SECONDS, isolation_level="IMMEDIATE", check_same_thread=False)
    connection.text_factory = bytes  # a flipped bit can turn a blob into text
    try:
        version = _pragma(connection, "user_version")
        is_foreign = _pragma(connection, "schema_version") and _pragma(connection, "application_id") != _APPLICATION_ID
        if is_foreign or version > _FORMAT:
            raise OSError("it is not a cache of this version of the package")
        if version < _FORMAT:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            with connection:  # whole or not at all: a kill must not leave what looks like another program's file
                connection.execute("BEGIN IMMEDIATE")
                if _pragma(connection, "user_version") < _FORMAT:  # another process may have begun it in the meantime
                    connection.execute("DROP TABLE IF EXISTS answers")
                    connection.execute("CREATE TABLE answers (key BLOB NOT NULL UNIQUE, value BLOB NOT NULL)")
                    connection.execute(f"PRAGMA user_version = {_FORMAT}")
                    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        # In WAL mode readers and the writer do not block each other. A power failure may lose the last writes, a
        # killed process loses none.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
    except BaseException:
        connection.close()
        raise
    return connection


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _bytes_in_use(connection: sqlite3.Connection) -> int:
    """Bytes of all pages in use."""
    pages = _pragma(connection, "page_count") - _pragma(connection, "freelist_count")
    return pages * _pragma(connection, "page_size")


def _row(key: bytes, answer: Answer) -> tuple[bytes, bytes] | None:
    """A row of the table; None for text with a lone surrogate."""
    try:
        value = _encoder.encode(answer)
    except UnicodeEncodeError:
        return None
    return key, _checksum(key, value) + value


def _decoded(key: bytes, value: object) -> Answer | None:
    """The answer in a row; None if its bytes have changed."""
    if not isinstance(value, bytes) or value[:_CHECKSUM_BYTES] != _checksum(key, value[_CHECKSUM_BYTES:]):
        return None
    return _decoder.decode(value[_CHECKSUM_BYTES:])


def _checksum(key: bytes, value: bytes) -> bytes:
    """Covers the key too, to detect an index that points to the wrong row. SQLite has no checksums."""
    return zlib.crc32(value, zlib.crc32(key)).to_bytes(_CHECKSUM_BYTES, "big")


def _hashed(index: str, key: AnswerKey) -> bytes:
    """128 bits: the chance of a collision among a billion keys is 1e-21."""
    text = f"{index}\0{key.n_results}\0{key.max_words or 0}\0{key.query}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class AnswerCache:
    """Answers by key, each valid for one index state: the most recently used in memory, and all that fit in an optional file."""

    def __init__(self, max_entries: int, path: Path | None, max_bytes: int) -> None:
        self._memory: LeastRecentlyUsed[tuple[str, AnswerKey], Answer] = LeastRecentlyUsed(max_entries)
        self._file = None if path is None else AnswerFile(path, max_bytes)
        self._thread = OwnThread("searchr1-cache")

    def recall(self, index: str, keys: Iterable[AnswerKey]) -> dict[AnswerKey, Answer]:
        """Answers from memory."""
        return {key: answer for key in keys if (answer := self._memory.get((index, key))) is not None}

    def remember(self, index: str, answers: Mapping[AnswerKey, Answer]) -> None:
        """Stores answers in memory."""
        for key, answer in answers.items():
            self._memory.put((index, key), answer)

    async def look_up(self, index: str, keys: Iterable[AnswerKey]) -> dict[AnswerKey, Answer]:
        """Answers from the file, which are then also kept in memory."""
        if self._file is None:
            return {}
        found = await self._thread.run(self._file.get_many, index, list(keys))
        self.remember(index, found)
        return found

    async def keep(self, index: str, answers: Mapping[AnswerKey, Answer]) -> None:
        """Stores answers in the file."""
        if self._file is not None and answers:
            await self._thread.run(self._file.put_many, index, answers)

    async def aclose(self) -> None:
        """Releases the file and the thread; the memory stays."""
        if self._file is not None:
            await self._thread.run(self._file.close)
        self._thread.close()
