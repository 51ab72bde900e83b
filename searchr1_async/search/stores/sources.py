"""Sources of a compact index: passages with vectors in a fixed order, from files or embedded while it is built."""

from __future__ import annotations

import asyncio
import hashlib
import mmap
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import anyio
import anyio.to_thread
import numpy as np
import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.tables import scan_parquet
from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.corpus import Corpus, CorpusSource, load_corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Embedder, Vectors
from searchr1_async.search.gemini import make_embedder
from searchr1_async.search.passage_embedding import (
    WINDOW,
    BuildOptions,
    Journal,
    PassageEmbedder,
    next_window,
    say_cost,
)
from searchr1_async.search.stores.vector_store import Metric, open_embedder

Block = tuple[list[Passage], Vectors]
"""Passages and their vectors ``[passages, dimension]``, float32."""

ROWS = 8_192
_COLUMNS = ("vector", "embedding")
_HASHED = 1 << 20
"""A file's fingerprint covers its size and this many bytes at both ends."""


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Facts of an open source."""

    name: str
    """For messages: the file or collection, and where it is."""
    fingerprint: str
    """Equal for equal passages and vectors; a build resumes only with the same fingerprint."""
    count: int
    """Number of passages, at least 1."""
    dimension: int
    """Dimension of the vectors."""
    metric: Metric
    embedder: str | None = None
    """Embedder of the vectors, as :func:`~searchr1_async.search.gemini.make_embedder` accepts it; None if unknown."""
    embedder_fingerprint: str | None = None


@runtime_checkable
class VectorSource(Protocol):
    """Passages with vectors, readable from any row in bounded memory. Used from one event loop."""

    async def open(self) -> SourceFacts:
        """Opens the source. Does nothing but return the facts if already open.

        Raises:
            CorpusError: the passages cannot be used.
            EmbeddingError: the embedder cannot be opened.
            StoreError: the vectors cannot be read, or do not match the passages.
        """
        ...

    def blocks(self, start: int) -> AsyncIterator[Block]:
        """All rows from ``start`` (0-based) in order, in blocks of 1 to 8,192 rows.

        Raises:
            CorpusError, EmbeddingError, StoreError: a row cannot be read; earlier blocks remain valid.
        """
        ...

    async def kept(self, rows: int) -> None:
        """Called once the first ``rows`` rows are on disk in the index: data kept for them may be dropped."""
        ...

    async def aclose(self) -> None:
        """Closes files, connections and threads. May be opened again."""
        ...


def lasting_name(embedder: str | Path | Embedder | None) -> str | None:
    """The embedder's name, absolute if it is a folder; None for an embedder object, which has no such name."""
    if not isinstance(embedder, str | Path):
        return None
    place = absolute_path(embedder, "embedder")
    return str(place) if place.is_dir() else str(embedder)


def named_embedder(embedder: str | Path | Embedder | None) -> tuple[str | None, str | None]:
    """The embedder's name and fingerprint; None where unknown.

    Raises:
        ConfigurationError, EmbeddingError: see :func:`~searchr1_async.search.gemini.make_embedder`.
    """
    if embedder is None:
        return None, None
    return lasting_name(embedder), make_embedder(embedder).fingerprint


class VectorFiles:
    """Vectors from ``.npy`` or Parquet files, in the row order of a corpus.

    Args:
        vectors: a file, or several in row order: ``.npy`` with an array ``[rows, dimension]`` of float16, float32 or float64
            (memory-mapped), or ``.parquet`` with a column ``vector`` or ``embedding`` of lists or arrays.
        corpus: the passages, as :func:`~searchr1_async.data.corpus.load_corpus` accepts them.
        metric: ``"cosine"``, ``"l2"`` or ``"ip"``.
        embedder: the embedder of the vectors, recorded in the index; None if unknown.

    Raises:
        CorpusError: the corpus does not exist.
        StoreError: no files, or a file of another type.
        EmbeddingError: the embedder does not exist.
    """

    def __init__(
        self,
        vectors: str | Path | Sequence[str | Path],
        corpus: CorpusSource,
        *,
        metric: Metric = "cosine",
        embedder: str | Path | Embedder | None = None,
    ) -> None:
        paths = [vectors] if isinstance(vectors, str | Path) else list(vectors)
        self._paths = [absolute_path(path, "vectors") for path in paths]
        if not paths or any(path.suffix.lower() not in (".npy", ".parquet") for path in self._paths):
            raise StoreError(f"vectors must be .npy or .parquet files, got {', '.join(map(str, paths)) or 'none'}")
        self._corpus = load_corpus(corpus)
        self._metric: Metric = metric
        self._embedder = named_embedder(embedder)
        self._files: list[_File] = []
        self._facts: SourceFacts | None = None

    async def open(self) -> SourceFacts:
        if self._facts is None:
            self._facts = await in_thread(self._open)
        return self._facts

    def _open(self) -> SourceFacts:
        self._files = [_File(path) for path in self._paths]
        first, count = self._files[0], sum(file.rows for file in self._files)
        for file in self._files:
            if file.dimension != first.dimension:
                raise StoreError(
                    f"{file.path} has vectors of dimension {file.dimension}, {first.path} of {first.dimension}: they come from "
                    "different embedders"
                )
        if count != len(self._corpus):
            raise StoreError(
                f"{count:,} vectors for the {len(self._corpus):,} passages of {self._corpus.source}: the counts must match"
            )
        if not first.dimension:
            raise StoreError(f"{first.path} holds vectors of dimension 0")
        name = f"{self._corpus.source} with the vectors of {', '.join(path.name for path in self._paths)}"
        parts = "\0".join([self._corpus.fingerprint, self._metric, *(file.fingerprint for file in self._files)])
        fingerprint = f"files-{hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()}"
        return SourceFacts(name, fingerprint, count, first.dimension, self._metric, *self._embedder)

    async def blocks(self, start: int) -> AsyncIterator[Block]:
        """See :meth:`~searchr1_async.search.stores.sources.VectorSource.blocks`."""
        if self._facts is None:
            raise StoreError(f"{self._corpus.source} is not open")
        vectors, passages = self._vectors(start), self._corpus.passages(start)
        while block := await in_thread(lambda: _next(vectors, passages)):
            start += len(block[0])
            yield block
        if start < self._facts.count:
            raise StoreError(f"{self._facts.name} ends at row {start:,} of {self._facts.count:,}: it has changed since")

    async def kept(self, rows: int) -> None:
        """Nothing to drop."""

    async def aclose(self) -> None:
        self._files, self._facts = [], None

    def _vectors(self, start: int) -> Iterator[Vectors]:
        """The checked vectors from row ``start``."""
        first = 0
        for file in self._files:
            if start < first + file.rows:
                row = max(start - first, 0)
                for part in file.parts(row):
                    wrong = np.flatnonzero(~np.isfinite(part).all(axis=1))
                    if wrong.size:
                        raise StoreError(
                            f"{file.path}, row {row + int(wrong[0]):,} (0-based) has values that are not finite as float32: "
                            "repair it, or remove it and its passage"
                        )
                    row += len(part)
                    yield part
            first += file.rows


def _next(vectors: Iterator[Vectors], passages: Iterator[Passage]) -> Block | None:
    part = next(vectors, None)
    if part is None:
        return None
    own = list(islice(passages, len(part)))
    return (own, part[: len(own)]) if own else None


class _File:
    """One file of vectors. All methods block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_parquet = path.suffix.lower() == ".parquet"
        try:
            self.rows, self.dimension = self._parquet_shape() if self._is_parquet else self._array().shape
            size = path.stat().st_size
            with path.open("rb") as file:
                ends = file.read(_HASHED)
                file.seek(max(0, size - _HASHED))
                ends += file.read()
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise StoreError(f"{path} cannot be read: {error}") from error
        self.fingerprint = f"{size}-{hashlib.blake2b(ends, digest_size=16).hexdigest()}"

    def parts(self, start: int) -> Iterator[Vectors]:
        """The vectors from a row on, at most 8,192 at a time."""
        try:
            yield from self._parquet_parts(start) if self._is_parquet else self._array_parts(start)
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error

    def _array(self) -> np.memmap:
        found = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if (
            not isinstance(found, np.memmap)
            or found.ndim != 2
            or found.dtype not in (np.float16, np.float32, np.float64)
        ):
            raise StoreError(
                f"{self.path} holds {found.dtype} of shape {found.shape}: use float16, float32 or float64 [rows, dimension]"
            )
        return found

    def _array_parts(self, start: int) -> Iterator[Vectors]:
        array = self._array()
        mapped = getattr(array, "_mmap", None)
        for first in range(start, len(array), ROWS):
            with np.errstate(over="ignore"):  # float64 values beyond float32 become infinite, and are rejected
                part = np.array(array[first : first + ROWS], np.float32)
            # Pages read would otherwise count as this process's memory.
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
            yield part

    def _parquet_shape(self) -> tuple[int, int]:
        frame = scan_parquet(self.path)
        names = frame.collect_schema().names()
        self._column = next((name for name in _COLUMNS if name in names), "")
        if not self._column:
            raise StoreError(
                f"{self.path} has neither a column 'vector' nor 'embedding' (columns: {', '.join(names) or 'none'})"
            )
        rows = int(frame.select(pl.len()).collect().item())
        kind = frame.collect_schema()[self._column]
        inner = getattr(kind, "inner", None)
        if inner is None or not pl.Series(dtype=inner).dtype.is_float():
            raise StoreError(f"{self.path}: the column {self._column!r} has type {kind}: use lists or arrays of floats")
        if isinstance(kind, pl.Array):
            return rows, int(kind.size)
        first = frame.select(self._column).head(1).collect().to_series()
        return rows, len(first[0]) if rows and first[0] is not None else 0

    def _parquet_parts(self, start: int) -> Iterator[Vectors]:
        frame = scan_parquet(self.path).select(self._column).slice(start)
        # Not slice by slice: each slice would read its whole row group again.
        for batch in frame.collect_batches(chunk_size=ROWS):
            column = batch.to_series()
            lengths = column.arr.len() if isinstance(column.dtype, pl.Array) else column.list.len()
            wrong = ((lengths.fill_null(0) != self.dimension) | column.is_null()).arg_true()
            inner = column.explode()
            if len(wrong) or inner.null_count():
                row = start + (wrong[0] if len(wrong) else inner.is_null().arg_true()[0] // self.dimension)
                raise StoreError(
                    f"{self.path}, row {row:,} (0-based) is not a vector of {self.dimension} numbers: repair it, or remove it "
                    "and its passage"
                )
            start += len(column)
            for first in range(0, len(column), ROWS):
                part = inner[first * self.dimension : (first + ROWS) * self.dimension]
                yield part.to_numpy().astype(np.float32).reshape(-1, self.dimension)


class EmbeddedCorpus:
    """The passages of a corpus in order, with vectors from an embedder.

    Embeds several windows of 512 passages ahead of the reader. Each vector is journalled until :meth:`kept`, so a kill repeats
    only requests in flight.

    Args:
        corpus: passages to embed.
        embedder: opened and closed here.
        journal_folder: used for this corpus and embedder only; created when needed.
        options: request pacing; the estimated cost is reported before the first request.
    """

    def __init__(self, corpus: Corpus, embedder: Embedder, journal_folder: Path, options: BuildOptions) -> None:
        self._corpus = corpus
        self._embedder = embedder
        self._folder = journal_folder
        self._options = options
        self._facts: SourceFacts | None = None
        self._journal: Journal | None = None
        self._forgotten = 0
        """Windows before this one are no longer in the journal."""
        # Plain asyncio tasks, since a generator may not yield inside a task group.
        self._ahead: deque[asyncio.Task[Block]] = deque()

    async def open(self) -> SourceFacts:
        if self._facts is None:
            count, fingerprint = await anyio.to_thread.run_sync(lambda: (len(self._corpus), self._corpus.fingerprint))
            await open_embedder(self._embedder, self._options.pacing)
            key = f"{fingerprint}\0{self._embedder.fingerprint}".encode()
            dimension = self._embedder.dimension
            self._journal = Journal(self._folder, self._embedder.fingerprint, dimension)
            self._facts = SourceFacts(
                f"{self._corpus.source}, embedded by {self._embedder.name}",
                f"embedded-{hashlib.blake2b(key, digest_size=16).hexdigest()}",
                count,
                dimension,
                "cosine",
                embedder_fingerprint=self._embedder.fingerprint,
            )
        return self._facts

    async def blocks(self, start: int) -> AsyncGenerator[Block, None]:
        """See :meth:`~searchr1_async.search.stores.sources.VectorSource.blocks`."""
        facts, journal = self._opened()
        if start >= facts.count:
            return
        await say_cost(self._corpus, facts.count, self._embedder, start, self._options.emit)
        own = PassageEmbedder(facts.name, self._corpus.source, self._embedder, journal, self._options)
        first = start // WINDOW
        windows = enumerate(self._corpus.batches(WINDOW, first * WINDOW), start=first)
        await self._stop()
        ahead = self._ahead
        try:
            await self._forget(first)
            await own.recall()
            at_once = own.windows_at_once(WINDOW)
            skipped = start % WINDOW
            while True:
                while len(ahead) < at_once and (window := await anyio.to_thread.run_sync(next_window, windows)):
                    ahead.append(asyncio.create_task(_embedded(own, *window, skipped)))
                    skipped = 0
                if not ahead:
                    return
                yield await ahead[0]
                ahead.popleft()
        except OSError as error:
            raise StoreError(f"the journal of {facts.name} cannot be read: {error.strerror or error}") from error
        finally:
            await _stopped(ahead)

    async def kept(self, rows: int) -> None:
        facts, journal = self._opened()
        if rows >= facts.count:
            await in_thread(journal.clear)
        else:
            await self._forget(rows // WINDOW)

    async def aclose(self) -> None:
        await self._stop()  # a reader that broke out of the loop has not closed the generator
        self._facts = self._journal = None
        self._forgotten = 0
        await self._embedder.aclose()

    async def _stop(self) -> None:
        ahead, self._ahead = self._ahead, deque()
        await _stopped(ahead)

    async def _forget(self, before: int) -> None:
        _, journal = self._opened()

        def forget() -> None:
            for window in range(self._forgotten, before):
                journal.forget(window)

        await in_thread(forget)
        self._forgotten = max(self._forgotten, before)

    def _opened(self) -> tuple[SourceFacts, Journal]:
        if self._facts is None or self._journal is None:
            raise StoreError(f"{self._corpus.source} is not open")
        return self._facts, self._journal


async def _stopped(tasks: Collection[asyncio.Task[Block]]) -> None:
    for task in tasks:
        task.cancel()
    with anyio.CancelScope(shield=True):
        await asyncio.gather(*tasks, return_exceptions=True)


async def _embedded(embedder: PassageEmbedder, number: int, passages: list[Passage], skipped: int) -> Block:
    """Embeds a window without its first ``skipped`` passages, which are already indexed."""
    wanted = passages[skipped:]
    vectors = await embedder.embed(number, number * WINDOW + skipped, wanted)
    return wanted, np.stack(vectors)
