"""Passage corpora: built in, and from JSONL or Parquet files of any size, read in bounded memory."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from searchr1_async.boundary.paths import absolute_path, cache_folder
from searchr1_async.boundary.settings import shown
from searchr1_async.boundary.tables import (
    FORMATS,
    ArrowTable,
    Columns,
    MemoryRows,
    UnreadableFileError,
    is_data_file,
    read_rows,
    renamed,
)
from searchr1_async.data.layouts import PASSAGE_COLUMNS, LayoutError, passage_of
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import CorpusError

logger = logging.getLogger(__name__)

_COLUMNS = frozenset(PASSAGE_COLUMNS)
_READER = "2"
"""Version of the passages read from a file; increase it when the same file yields others, to invalidate cached fingerprints."""


@dataclass(frozen=True, slots=True)
class _Content:
    """The result of a full pass over a corpus."""

    count: int
    fingerprint: str


class Corpus(ABC):
    """Passages in a fixed order, with unique ids and non-blank texts.

    ``len(corpus)`` and :attr:`fingerprint` read and check the whole corpus once. For a file, the result is cached in the user's
    cache folder until the file changes.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        """``"atlas"`` or the file's path, for messages."""

    @abstractmethod
    def _passages(self) -> Iterator[tuple[str, Passage]]:
        """All passages with their place in the source."""

    def __len__(self) -> int:
        """The number of passages.

        Raises:
            CorpusError: see :meth:`check`.
        """
        return self._content.count

    @property
    def fingerprint(self) -> str:
        """A hash of ids, titles and texts in order, 32 hexadecimal digits.

        Raises:
            CorpusError: see :meth:`check`.
        """
        return self._content.fingerprint

    def check(self) -> None:
        """Reads and checks the whole corpus, once.

        Raises:
            CorpusError: it is empty or unreadable, or a passage lacks an id or text, or has a duplicate id.
        """
        _ = self._content

    def check_first(self) -> None:
        """Checks the first passage only.

        Raises:
            CorpusError: it is missing or unusable.
        """
        if next(self._passages(), None) is None:
            raise CorpusError(f"{self.source} holds no passages")

    def passages(self, start: int = 0) -> Iterator[Passage]:
        """All passages from number ``start`` (0-based)."""
        for _, passage in islice(self._passages(), start, None):
            yield passage

    def batches(self, size: int, start: int = 0) -> Iterator[list[Passage]]:
        """Lists of ``size`` passages in order, the last one possibly shorter, after skipping ``start`` passages."""
        if size < 1:
            raise CorpusError(f"batch size is {size}: it must be at least 1")
        passages = self.passages(start)
        while batch := list(islice(passages, size)):
            yield batch

    @cached_property
    def _content(self) -> _Content:
        return _read_whole(self.source, self._passages)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r})"


class MemoryCorpus(Corpus):
    """Passages, or rows of a table, in memory.

    Args:
        passages: passages, or a table with the rows of a corpus file.
        source: for messages; None uses the table's kind.
        columns: see :func:`load_corpus`.

    Raises:
        CorpusError: it is not a table.
    """

    def __init__(
        self,
        passages: Iterable[Passage] | Iterable[Mapping[str, Any]] | ArrowTable,
        source: str | None = None,
        columns: Columns | None = None,
    ) -> None:
        try:
            self._table = MemoryRows(passages)
            self._are_passages = isinstance(self._table.first(), Passage)
        except UnreadableFileError as error:
            raise CorpusError(str(error)) from error
        super().__init__(
            source or ("passages" if self._are_passages or self._table.kind == "rows" else self._table.name)
        )
        self._columns = columns
        self.is_large = self._table.kind == "dataset"
        """Whether it may exceed memory."""

    def _passages(self) -> Iterator[tuple[str, Passage]]:
        return self._given() if self._are_passages else _read_passages(self.source, self._table.rows, self._columns)

    def _given(self) -> Iterator[tuple[str, Passage]]:
        for number, (_, passage) in enumerate(self._table, start=1):
            if not isinstance(passage, Passage):
                raise CorpusError(
                    f"{self.source}, passage {number} is a {type(passage).__name__}: pass Passage(…) for each"
                )
            if not passage.id or not passage.text.strip():
                raise CorpusError(f"{self.source}, passage {number} has no {'text' if passage.id else 'id'}")
            yield f"passage {number}", passage


class FileCorpus(Corpus):
    """A file with the columns ``id``, ``title`` and ``text``; or, as in Search-R1 and FlashRAG, with ``id`` and ``contents`` (the
    title in quotes, a newline, the text). Other columns are ignored.

    Raises:
        CorpusError: the file cannot be read, or its first row lacks a column.
    """

    def __init__(self, path: Path, columns: Columns | None = None) -> None:
        super().__init__(str(path))
        self._path = path
        self._columns = columns
        self.check_first()

    def _passages(self) -> Iterator[tuple[str, Passage]]:
        # All columns if any is renamed, so that an error can list them.
        wanted = None if self._columns else _COLUMNS
        return _read_passages(self.source, lambda: read_rows(self._path, wanted), self._columns)

    @cached_property
    def _content(self) -> _Content:
        status = self._path.stat()
        named = json.dumps(dict(self._columns or {}), sort_keys=True)
        state = f"{self._path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{_READER}\0{named}"
        kept = cache_folder() / "corpora" / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.json"
        try:
            found = json.loads(kept.read_text(encoding="utf-8"))
            return _Content(int(found["count"]), str(found["fingerprint"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        content = _read_whole(self.source, self._passages)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"count": content.count, "fingerprint": content.fingerprint}), encoding="utf-8")
        except OSError as error:  # a read-only home directory only costs time
            logger.info("the fingerprint of %s is not cached: %s", self.source, error)
        return content


CorpusSource: TypeAlias = str | Path | Corpus | Iterable[Passage] | Iterable[Mapping[str, Any]] | ArrowTable
"""A name, a file, a corpus, passages, or an in-memory table; see :func:`load_corpus`."""


def load_corpus(name_or_path: CorpusSource, *, columns: Columns | None = None) -> Corpus:
    """Loads a corpus by name, or from a file, an in-memory table, or passages.

    Only the first row of a file or ``Dataset`` is checked here. The rest is checked by :meth:`Corpus.check`, ``len`` or
    :attr:`Corpus.fingerprint`, and always before anything is embedded.

    Args:
        name_or_path: ``"atlas"`` (built in); a JSONL, JSON, CSV, TSV (each also with ``.gz``) or Parquet file with ``id``,
            ``title`` and ``text``; a polars or pandas frame, a ``datasets.Dataset`` or a list of dicts with the same columns;
            passages; or a corpus, which is returned as is.
        columns: column names in the source: ``{"id": "_id", "text": "passage"}``.

    Raises:
        CorpusError: unknown name or file, unreadable, empty, or columns are missing.
    """
    if isinstance(name_or_path, Corpus):
        return name_or_path
    if not isinstance(name_or_path, str | Path):
        corpus = MemoryCorpus(name_or_path, columns=columns)
        if corpus.is_large:
            corpus.check_first()
        else:
            corpus.check()
        return corpus
    name = str(name_or_path)
    path = absolute_path(name_or_path, "corpus") if name.strip() else Path(name)
    if path.is_file():
        return FileCorpus(path, columns)
    if name == "atlas":
        from searchr1_async.data.atlas_corpus import atlas_passages

        return MemoryCorpus(atlas_passages(), "atlas")
    if path.is_dir():
        raise CorpusError(f"{path} is a folder: name a file in it")
    if is_data_file(path):
        raise CorpusError(f"the corpus file {path} does not exist (looked in {path.parent})")
    raise CorpusError(f"unknown corpus {name!r}: use 'atlas', or a file ({FORMATS})")


def _read_passages(
    source: str, rows: Callable[[], Iterator[tuple[str, dict[str, Any]]]], columns: Columns | None
) -> Iterator[tuple[str, Passage]]:
    place = "row 1"
    try:
        for place, row in renamed(rows(), columns, PASSAGE_COLUMNS, source):
            yield place, passage_of(row)
    except LayoutError as error:
        raise CorpusError(f"{source}, {place} {error}") from None
    except UnreadableFileError as error:
        raise CorpusError(str(error)) from error


def _read_whole(source: str, passages: Callable[[], Iterator[tuple[str, Passage]]]) -> _Content:
    """Counts, hashes and finds duplicate ids in one pass; 8 bytes of memory per passage."""
    digest = hashlib.blake2b(digest_size=16)
    id_hashes = bytearray()
    for place, passage in passages():
        try:
            encoded = [field.encode() for field in (passage.id, passage.title, passage.text)]
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{source}, {place} has an invalid character (a lone surrogate) in {shown(error.object)}: read its file as UTF-8"
            ) from None
        digest.update(b"".join(len(field).to_bytes(8, "little") + field for field in encoded))
        id_hashes += _id_hash(passage)
    if not id_hashes:
        raise CorpusError(f"{source} holds no passages")
    hashes = np.sort(np.frombuffer(bytes(id_hashes), dtype=np.uint64))
    suspects = hashes[1:][hashes[1:] == hashes[:-1]]
    if suspects.size:
        _refuse_duplicates(source, passages(), {int(suspect) for suspect in suspects})
    return _Content(len(hashes), digest.hexdigest())


def _id_hash(passage: Passage) -> bytes:
    return hashlib.blake2b(passage.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _refuse_duplicates(source: str, passages: Iterator[tuple[str, Passage]], suspects: set[int]) -> None:
    """Reports the first duplicate id; two ids with the same hash are no error."""
    seen: dict[str, str] = {}
    for place, passage in passages:
        if int(np.frombuffer(_id_hash(passage), dtype=np.uint64)[0]) in suspects:
            if passage.id in seen:
                raise CorpusError(
                    f"{source}, {place} has the same id {passage.id!r} as {seen[passage.id]}: make the ids unique"
                )
            seen[passage.id] = place
