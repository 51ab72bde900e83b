"""Vectors in files, with the passages of a corpus: what another program embedded."""

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
from searchr1_async.data.corpus import CorpusSource, load_corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Embedder, Vectors
from searchr1_async.search.sources.base import Block, SourceFacts
from searchr1_async.search.sources.named import named_embedder
from searchr1_async.search.stores.base import Metric
from searchr1_async.threads import in_thread

ROWS = 8_192
_COLUMNS = ("vector", "embedding")
_HASHED = 1 << 20
"""Bytes at both ends of a file that its fingerprint is made of, with its size: 32 GB are not read for it."""


class VectorFiles:
    """Vectors of ``.npy`` or Parquet files, row by row those of a corpus.

    Args:
        vectors: a file, or several in the order of the rows: ``.npy`` with an array ``[rows, dimension]`` of float16, float32 or
            float64 (mapped into memory), or ``.parquet`` with a column ``vector`` or ``embedding`` of lists or arrays.
        corpus: the passages: whatever :func:`~searchr1_async.data.corpus.load_corpus` takes.
        metric: how near two vectors are: ``"cosine"``, ``"l2"`` or ``"ip"``.
        embedder: what made the vectors, for whoever searches the index; None where that is not known.

    Raises:
        CorpusError: no such corpus.
        StoreError: no files are given, or one that is neither.
        EmbeddingError: no such embedder.
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
            raise StoreError(f"vectors are in .npy or .parquet files, not in {', '.join(map(str, paths)) or 'none'}")
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
                    f"{file.path} holds vectors of {file.dimension} numbers, {first.path} of {first.dimension}: they belong to "
                    "different embedders"
                )
        if count != len(self._corpus):
            raise StoreError(
                f"{count:,} vectors for the {len(self._corpus):,} passages of {self._corpus.source}: there must be one for each"
            )
        if not first.dimension:
            raise StoreError(f"{first.path} holds vectors of no numbers")
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
        """Nothing is remembered of them."""

    async def aclose(self) -> None:
        self._files, self._facts = [], None

    def _vectors(self, start: int) -> Iterator[Vectors]:
        """From row ``start`` on, checked."""
        first = 0
        for file in self._files:
            if start < first + file.rows:
                row = max(start - first, 0)
                for part in file.parts(row):
                    wrong = np.flatnonzero(~np.isfinite(part).all(axis=1))
                    if wrong.size:
                        raise StoreError(
                            f"{file.path}, row {row + int(wrong[0]):,} (counted from 0) holds numbers that are not finite in "
                            "32 bits: mend it, or leave out it and its passage"
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
    """One file of vectors. Everything blocks on the disk."""

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
        """The vectors from one on, at most 8,192 at once."""
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
                f"{self.path} holds {found.dtype} of shape {found.shape}: give float16, float32 or float64 [rows, dimension]"
            )
        return found

    def _array_parts(self, start: int) -> Iterator[Vectors]:
        array = self._array()
        mapped = getattr(array, "_mmap", None)
        for first in range(start, len(array), ROWS):
            with np.errstate(over="ignore"):  # a float64 beyond float32 is refused as infinite
                part = np.array(array[first : first + ROWS], np.float32)
            # What was read would count as this process's memory until the system wants it back.
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
            yield part

    def _parquet_shape(self) -> tuple[int, int]:
        frame = scan_parquet(self.path)
        names = frame.collect_schema().names()
        self._column = next((name for name in _COLUMNS if name in names), "")
        if not self._column:
            raise StoreError(
                f"{self.path} has no column 'vector' and no column 'embedding' (but {', '.join(names) or 'none'})"
            )
        rows = int(frame.select(pl.len()).collect().item())
        kind = frame.collect_schema()[self._column]
        inner = getattr(kind, "inner", None)
        if inner is None or not pl.Series(dtype=inner).dtype.is_float():
            raise StoreError(f"{self.path}: the column {self._column!r} holds {kind}: give lists or arrays of floats")
        if isinstance(kind, pl.Array):
            return rows, int(kind.size)
        first = frame.select(self._column).head(1).collect().to_series()
        return rows, len(first[0]) if rows and first[0] is not None else 0

    def _parquet_parts(self, start: int) -> Iterator[Vectors]:
        frame = scan_parquet(self.path).select(self._column).slice(start)
        # Not slice by slice, each of which reads its whole row group again: 15 s against 5 s for 200,000 vectors of 384.
        for batch in frame.collect_batches(chunk_size=ROWS):
            column = batch.to_series()
            lengths = column.arr.len() if isinstance(column.dtype, pl.Array) else column.list.len()
            wrong = ((lengths.fill_null(0) != self.dimension) | column.is_null()).arg_true()
            inner = column.explode()
            if len(wrong) or inner.null_count():
                row = start + (wrong[0] if len(wrong) else inner.is_null().arg_true()[0] // self.dimension)
                raise StoreError(
                    f"{self.path}, row {row:,} (counted from 0) holds no vector of {self.dimension} numbers: mend it, or leave "
                    "out it and its passage"
                )
            start += len(column)
            for first in range(0, len(column), ROWS):
                part = inner[first * self.dimension : (first + ROWS) * self.dimension]
                yield part.to_numpy().astype(np.float32).reshape(-1, self.dimension)
