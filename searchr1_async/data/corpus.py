"""Corpora of passages: the built-in one, and JSONL or Parquet files of any size, read in bounded memory."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from searchr1_async.boundary.paths import cache_folder
from searchr1_async.data.files import UnreadableFileError, is_data_file, read_rows
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import CorpusError

logger = logging.getLogger(__name__)

_COLUMNS = frozenset({"id", "title", "text", "contents"})


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
    """Passages that are in memory already."""

    def __init__(self, passages: Sequence[Passage], source: str = "passages") -> None:
        super().__init__(source)
        self._kept = tuple(passages)

    def _passages(self) -> Iterator[tuple[str, Passage]]:
        for number, passage in enumerate(self._kept, start=1):
            if not passage.id or not passage.text.strip():
                raise CorpusError(f"{self.source}, passage {number} has no {'text' if passage.id else 'id'}")
            yield f"passage {number}", passage


class FileCorpus(Corpus):
    """A JSONL or Parquet file with the columns ``id``, ``title`` and ``text``; other columns are left unread.

    The file of Search-R1 and FlashRAG, which has ``contents`` (the title in quotes, a newline, the text) in place of
    ``title`` and ``text``, is read as well.

    Raises:
        CorpusError: the file cannot be read, or its first row lacks a column.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        if next(self._passages(), None) is None:
            raise CorpusError(f"{path} holds no passages")

    def _passages(self) -> Iterator[tuple[str, Passage]]:
        try:
            for place, row in read_rows(self._path, _COLUMNS):
                yield place, _passage(f"{self.source}, {place}", row)
        except UnreadableFileError as error:
            raise CorpusError(str(error)) from error

    @cached_property
    def _content(self) -> _Content:
        status = self._path.stat()
        state = f"{self._path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
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


def load_corpus(name_or_path: str | Path | Sequence[Passage] | Corpus) -> Corpus:
    """A corpus by name (``"atlas"``, built in), from a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, or from passages.

    The first row is looked at here; the rest is read and checked by :meth:`Corpus.check`, ``len`` or
    :attr:`Corpus.fingerprint`, whichever comes first, and in any case before anything is embedded.

    Raises:
        CorpusError: no such file or name, not readable, empty, or without the columns.
    """
    if isinstance(name_or_path, Corpus):
        return name_or_path
    if not isinstance(name_or_path, str | Path):
        corpus = MemoryCorpus(name_or_path)
        corpus.check()
        return corpus
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return FileCorpus(path)
    if str(name_or_path) == "atlas":
        from searchr1_async.data.atlas import atlas_passages

        return MemoryCorpus(atlas_passages(), "atlas")
    if path.is_dir():
        raise CorpusError(f"{path} is a folder: name the file within it")
    if is_data_file(path):
        raise CorpusError(f"there is no corpus file {path} (looked in {path.absolute().parent})")
    raise CorpusError(f"unknown corpus {str(name_or_path)!r}: give 'atlas', or a .jsonl or .parquet file")


def _passage(place: str, row: Mapping[str, Any]) -> Passage:
    missing = {"id", "text"} - row.keys()
    if missing == {"text"} and "contents" in row:
        title, text = split_contents(_text(place, row, "contents"))
    elif missing:
        raise CorpusError(
            f"{place} has no column {' and no column '.join(map(repr, sorted(missing)))}: "
            f"a corpus has 'id', 'title' and 'text' (this one: {', '.join(map(str, row))})"
        )
    else:
        title, text = str(row.get("title") or ""), _text(place, row, "text")
    own_id = row["id"]
    if own_id is None or own_id == "":
        raise CorpusError(f"{place} has no 'id': give every passage one of its own")
    return Passage(str(own_id), title, text)


def _text(place: str, row: Mapping[str, Any], column: str) -> str:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        state = "null" if text is None else "blank" if isinstance(text, str) else f"a {type(text).__name__}"
        raise CorpusError(f"{place} has a {column!r} that is {state}: leave the row out, or give it text")
    return text


def split_contents(contents: str, *, only_quoted: bool = False) -> tuple[str, str]:
    """The first line without its quotes as the title, and the text below it; no title where nothing stands below.

    Args:
        contents: title, newline, text.
        only_quoted: a first line that is not in quotes is no title.
    """
    line, newline, text = contents.partition("\n")
    line = line.strip()
    is_quoted = len(line) > 2 and line[0] == line[-1] == '"'
    if not newline or not text.strip() or (only_quoted and not is_quoted):
        return "", contents
    return line.strip('"'), text


def _read_whole(source: str, passages: Callable[[], Iterator[tuple[str, Passage]]]) -> _Content:
    """One pass that counts, hashes, and finds ids given twice; 8 bytes of memory a passage."""
    digest = hashlib.blake2b(digest_size=16)
    id_hashes = bytearray()
    for _, passage in passages():
        encoded = [field.encode("utf-8", "surrogatepass") for field in (passage.id, passage.title, passage.text)]
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
