"""Vectors from files, embedded by another program, with the passages of a corpus."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.tables import scan_parquet
from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.corpus import CorpusSource, load_corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Embedder, Vectors
from searchr1_async.search.sources.base import Block, SourceFacts
from searchr1_async.search.sources.named import named_embedder
from searchr1_async.search.stores.base import Metric

ROWS = 8_192
_COLUMNS = ("vector", "embedding")
_HASHED = 1 << 20
"""A file's fingerprint covers its size and this many bytes at both ends."""


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
        """See :meth:`~searchr1_async.search.sources.base.VectorSource.blocks`."""
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
