"""Passage corpora: built in, and from JSONL or Parquet files of any size, read in bounded memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from searchr1_async.boundary import tables
from searchr1_async.boundary.paths import cache_folder
from searchr1_async.boundary.settings import shown
from searchr1_async.boundary.tables import ArrowTable, Columns, LayoutError, Row, is_missing
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import CorpusError

logger = logging.getLogger(__name__)

PASSAGE_COLUMNS = ("text", "id", "title", "contents")
_READER = "2"
"""Version of the passages read from a file; increase it when the same file yields others, to invalidate cached fingerprints."""


class Corpus:
    """Passages in a fixed order, with unique ids and non-blank texts; see :func:`load_corpus`.

    ``len(corpus)`` and :attr:`fingerprint` read and check the whole corpus once. For a file, the result is cached in the user's
    cache folder until the file changes.

    Args:
        source: for messages.
        rows: starts reading the rows or passages, each with its place; ``columns`` are their names there.
        file: the file, if the result of a full pass may be cached.
    """

    def __init__(
        self, source: str, rows: Callable[[], Iterable[Row]], columns: Columns | None = None, file: Path | None = None
    ) -> None:
        self.source = source
        self._rows, self._columns, self._file = rows, columns, file

    def __len__(self) -> int:
        """The number of passages. Raises as :meth:`check`."""
        return self._content[0]

    @property
    def fingerprint(self) -> str:
        """A hash of ids, titles and texts in order, 32 hexadecimal digits. Raises as :meth:`check`."""
        return self._content[1]

    def check(self, *, first_only: bool = False) -> None:
        """Reads and checks the whole corpus once, or its first passage. Raises CorpusError if a passage is unusable or there is none."""
        if not first_only:
            _ = self._content
        elif next(self.passages(), None) is None:
            raise CorpusError(f"{self.source} holds no passages")

    def passages(self, start: int = 0) -> Iterator[Passage]:
        """All passages from number ``start`` (0-based)."""
        return (passage for _, passage in islice(self._read(), start, None))

    def batches(self, size: int, start: int = 0) -> Iterator[list[Passage]]:
        """Lists of ``size`` passages in order, the last one possibly shorter, after skipping ``start`` passages."""
        passages = self.passages(start)
        while batch := list(islice(passages, size)):
            yield batch

    def _read(self) -> Iterator[tuple[str, Passage]]:
        """Each passage with its place in the source."""
        with tables.table_errors(CorpusError):
            yield from tables.read_values(self.source, self._rows(), self._columns, PASSAGE_COLUMNS, passage_of)

    @cached_property
    def _content(self) -> tuple[int, str]:
        """The number of passages, and the fingerprint."""
        if self._file is None:
            return _read_whole(self.source, self._read)
        kept = cache_folder() / "corpora" / f"{_state_of(self._file, self._columns)}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(kept.read_text(encoding="utf-8"))
            return int(found["count"]), str(found["fingerprint"])
        count, fingerprint = _read_whole(self.source, self._read)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"count": count, "fingerprint": fingerprint}), encoding="utf-8")
        except OSError as error:  # a read-only home directory only costs time
            logger.info("the fingerprint of %s is not cached: %s", self.source, error)
        return count, fingerprint


CorpusSource: TypeAlias = str | Path | Corpus | Iterable[Passage] | Iterable[Mapping[str, Any]] | ArrowTable
"""A name, a file, a corpus, passages, or an in-memory table; see :func:`load_corpus`."""


def load_corpus(name_or_path: CorpusSource, *, columns: Columns | None = None) -> Corpus:
    """Loads a corpus by name, or from a file, an in-memory table, or passages.

    Only the first row of a file or ``Dataset`` is checked here. The rest is checked by :meth:`Corpus.check`, ``len`` or
    :attr:`Corpus.fingerprint`, and always before anything is embedded.

    Args:
        name_or_path: ``"atlas"`` (built in); a JSONL, JSON, CSV, TSV (each also with ``.gz``) or Parquet file with ``id``,
            ``title`` and ``text``, or, as in Search-R1 and FlashRAG, with ``id`` and ``contents`` (the title in quotes, a newline,
            the text); a polars or pandas frame, a ``datasets.Dataset`` or a list of dicts with the same columns; passages; or a
            corpus, which is returned as is. Other columns are ignored.
        columns: column names in the source: ``{"id": "_id", "text": "passage"}``.

    Raises:
        CorpusError: unknown name or file, unreadable, empty, or columns are missing.
    """
    if isinstance(name_or_path, Corpus):
        return name_or_path
    with tables.table_errors(CorpusError):
        if not isinstance(name_or_path, str | Path):
            kind, rows = tables.memory_rows(name_or_path)
            corpus = Corpus("passages" if kind == "rows" else f"the {kind}", rows, columns)
            corpus.check(first_only=kind == "dataset")  # which may exceed memory
            return corpus
        if str(name_or_path) == "atlas" and not Path(name_or_path).is_file():
            from searchr1_async.data.atlas_corpus import atlas_passages

            return Corpus("atlas", lambda: (("a passage", passage) for passage in atlas_passages()))
        path = tables.find_file(name_or_path, "corpus")
    if path is None:
        raise CorpusError(f"unknown corpus {str(name_or_path)!r}: use 'atlas', or a file ({tables.FORMATS})")
    # All columns if any is renamed, so that an error can list them.
    rows = partial(tables.read_rows, path, None if columns else frozenset(PASSAGE_COLUMNS))
    corpus = Corpus(str(path), rows, columns, path)
    corpus.check(first_only=True)
    return corpus


def passage_of(row: Passage | Mapping[str, Any]) -> Passage:
    """The passage of a row with ``id``, optional ``title`` and ``text``; or with ``id`` and ``contents``; or as given. Raises LayoutError."""
    if isinstance(row, Passage) and row.id and row.text.strip():
        return row
    if isinstance(row, Passage):
        raise LayoutError(f"has no {'text' if row.id else 'id'}")
    tables.check_is_row(row, "Passage")
    column = "text" if "text" in row or "contents" not in row else "contents"
    for name in ("id", column):
        if name not in row:
            raise LayoutError(f"has no column {tables.missing_column(name, row)}")
    text, title, own_id = row[column], row.get("title"), row["id"]
    if not isinstance(text, str) or not text.strip():
        state = "null" if is_missing(text) else "blank" if isinstance(text, str) else f"a {type(text).__name__}"
        raise LayoutError(f"has a {column!r} that is {state}: remove the row, or give it text")
    if column == "contents":
        title, text = split_contents(text)
    if not isinstance(title, str):
        title = tables.name_in(row, "title")
    if not isinstance(own_id, str):
        own_id = tables.name_in(row, "id")
    if not own_id:
        raise LayoutError("has no 'id': every passage needs a unique one")
    return Passage(own_id, title, text)


def split_contents(contents: str, *, only_quoted: bool = False) -> tuple[str, str]:
    """Title (the first line, without its quotes; perhaps only if it has some) and text; no title if nothing follows the first line."""
    line, newline, text = contents.partition("\n")
    line = line.strip()
    is_quoted = len(line) > 2 and line[0] == line[-1] == '"'
    if not newline or not text.strip() or (only_quoted and not is_quoted):
        return "", contents
    return line.strip('"'), text


def _state_of(path: Path, columns: Columns | None) -> str:
    """A hash of what the passages of a file depend on, without reading it."""
    status = path.stat()
    named = json.dumps(dict(columns or {}), sort_keys=True)
    state = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{_READER}\0{named}"
    return hashlib.sha256(state.encode()).hexdigest()[:32]


def _read_whole(source: str, read: Callable[[], Iterator[tuple[str, Passage]]]) -> tuple[int, str]:
    """Counts, hashes and finds duplicate ids in one pass; 8 bytes of memory per passage."""
    digest = hashlib.blake2b(digest_size=16)
    id_hashes = bytearray()
    for place, passage in read():
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
        _refuse_duplicates(source, read(), {int(suspect) for suspect in suspects})
    return len(hashes), digest.hexdigest()


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
