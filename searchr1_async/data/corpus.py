"""Corpora of passages: the built-in one, and JSONL or Parquet files of any size, read in bounded memory."""

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
from searchr1_async.boundary.rows import (
    FORMATS,
    ArrowTable,
    Columns,
    MemoryRows,
    UnreadableFileError,
    is_data_file,
    read_rows,
    renamed,
)
from searchr1_async.boundary.values import shown
from searchr1_async.data.layouts import PASSAGE_COLUMNS, LayoutError, passage_of
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import CorpusError

logger = logging.getLogger(__name__)

_COLUMNS = frozenset(PASSAGE_COLUMNS)
_READER = "2"
"""Of what a file's passages are made of; counted up where the same file would give others, so that no old fingerprint is taken."""


@dataclass(frozen=True, slots=True)
class _Content:
    """What a whole pass over a corpus finds."""

    count: int
    fingerprint: str


class Corpus(ABC):
    """Passages in a fixed order, each with an id of its own and some text.

    ``len(corpus)`` and :attr:`fingerprint` read the whole corpus once and check every passage (a file's outcome is
    kept in the user's cache folder, so that the next time costs nothing while the file stays as it is).
    """

    def __init__(self, source: str) -> None:
        self.source = source
        """``"atlas"``, or the file's path, for messages."""

    @abstractmethod
    def _passages(self) -> Iterator[tuple[str, Passage]]:
        """Every passage with the place it stands at, from the beginning."""

    def __len__(self) -> int:
        """The number of passages.

        Raises:
            CorpusError: as :meth:`check`.
        """
        return self._content.count

    @property
    def fingerprint(self) -> str:
        """A hash of ids, titles and texts in their order, 32 hexadecimal digits: equal for equal content anywhere.

        Raises:
            CorpusError: as :meth:`check`.
        """
        return self._content.fingerprint

    def check(self) -> None:
        """Reads the whole corpus unless that was done before.

        Raises:
            CorpusError: it is empty, cannot be read, or a passage has no id, no text, or another one's id.
        """
        _ = self._content

    def check_first(self) -> None:
        """Looks at the first passage alone.

        Raises:
            CorpusError: there is none, or it cannot be used.
        """
        if next(self._passages(), None) is None:
            raise CorpusError(f"{self.source} holds no passages")

    def passages(self, start: int = 0) -> Iterator[Passage]:
        """Every passage from number ``start`` (counted from 0) on."""
        for _, passage in islice(self._passages(), start, None):
            yield passage

    def batches(self, size: int, start: int = 0) -> Iterator[list[Passage]]:
        """Lists of ``size`` passages, the last one shorter, in the corpus's order; ``start`` passages are left out."""
        if size < 1:
            raise CorpusError(f"a batch of {size} passages: give at least 1")
        passages = self.passages(start)
        while batch := list(islice(passages, size)):
            yield batch

    @cached_property
    def _content(self) -> _Content:
        return _read_whole(self.source, self._passages)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r})"


class MemoryCorpus(Corpus):
    """Passages, or rows of a table, that are in memory already.

    Args:
        passages: passages, or a table whose rows are those of a corpus file.
        source: for messages; None for the table's kind.
        columns: as :func:`load_corpus`.

    Raises:
        CorpusError: it is no table.
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
        """It may be larger than the memory."""

    def _passages(self) -> Iterator[tuple[str, Passage]]:
        return self._given() if self._are_passages else _read_passages(self.source, self._table.rows, self._columns)

    def _given(self) -> Iterator[tuple[str, Passage]]:
        for number, (_, passage) in enumerate(self._table, start=1):
            if not isinstance(passage, Passage):
                raise CorpusError(
                    f"{self.source}, passage {number} is a {type(passage).__name__}: give Passage(…) for each"
                )
            if not passage.id or not passage.text.strip():
                raise CorpusError(f"{self.source}, passage {number} has no {'text' if passage.id else 'id'}")
            yield f"passage {number}", passage


class FileCorpus(Corpus):
    """A file with the columns ``id``, ``title`` and ``text``; other columns are left unread.

    The file of Search-R1 and FlashRAG, which has ``contents`` (the title in quotes, a newline, the text) in place of
    ``title`` and ``text``, is read as well.

    Raises:
        CorpusError: the file cannot be read, or its first row lacks a column.
    """

    def __init__(self, path: Path, columns: Columns | None = None) -> None:
        super().__init__(str(path))
        self._path = path
        self._columns = columns
        self.check_first()

    def _passages(self) -> Iterator[tuple[str, Passage]]:
        # Every column where one is named, so that the message about a misspelt one can list them.
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
        except OSError as error:  # a read-only home costs time, not the run
            logger.info("the fingerprint of %s is not kept: %s", self.source, error)
        return content


CorpusSource: TypeAlias = str | Path | Corpus | Iterable[Passage] | Iterable[Mapping[str, Any]] | ArrowTable
"""A name, a file, a corpus, passages, or a table in memory; see :func:`load_corpus`."""


def load_corpus(name_or_path: CorpusSource, *, columns: Columns | None = None) -> Corpus:
    """A corpus by name, from a file, from a table in memory, or from passages.

    The first row of a file or of a ``Dataset`` is looked at here; the rest is read and checked by :meth:`Corpus.check`, ``len`` or
    :attr:`Corpus.fingerprint`, whichever comes first, and in any case before anything is embedded.

    Args:
        name_or_path: ``"atlas"`` (built in); a JSONL, JSON, CSV, TSV (each also with ``.gz``) or Parquet file with ``id``,
            ``title`` and ``text``; a frame of polars or pandas, a ``datasets.Dataset`` or a list of dicts with the same
            columns; passages; or a corpus, which is taken as it is.
        columns: what the source calls its columns: ``{"id": "_id", "text": "passage"}``.

    Raises:
        CorpusError: no such file or name, not readable, empty, or without the columns.
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
        from searchr1_async.data.atlas import atlas_passages

        return MemoryCorpus(atlas_passages(), "atlas")
    if path.is_dir():
        raise CorpusError(f"{path} is a folder: name the file within it")
    if is_data_file(path):
        raise CorpusError(f"there is no corpus file {path} (looked in {path.parent})")
    raise CorpusError(f"unknown corpus {name!r}: give 'atlas', or a file ({FORMATS})")


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
    """One pass that counts, hashes, and finds ids given twice; 8 bytes of memory a passage."""
    digest = hashlib.blake2b(digest_size=16)
    id_hashes = bytearray()
    for place, passage in passages():
        try:
            encoded = [field.encode() for field in (passage.id, passage.title, passage.text)]
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{source}, {place} holds half a character (a lone surrogate) in {shown(error.object)}: read its file as UTF-8"
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
    """Names the first id given twice; two different ids of one hash are no error."""
    seen: dict[str, str] = {}
    for place, passage in passages:
        if int(np.frombuffer(_id_hash(passage), dtype=np.uint64)[0]) in suspects:
            if passage.id in seen:
                raise CorpusError(
                    f"{source}, {place} has the same id {passage.id!r} as {seen[passage.id]}: make the ids unique"
                )
            seen[passage.id] = place
