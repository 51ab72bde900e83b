"""The full vectors of an index: rows of float16 or of 8-bit numbers in one file, read a few rows at a time from anywhere."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.compact.appended import AppendedFile
from searchr1_async.search.stores.compact.layout import SCALES_NAME, VECTORS_NAME, VectorType

Rows = NDArray[np.int64]
"""Numbers of rows, counted from 0."""

SLAB_ROWS = 65_536
"""Rows that are read together where all are: 200 MB as float32 at 768 dimensions."""
_QUERIES_TOGETHER = 8
"""Ranked together: their 400 candidates, 1.2 MB as float32, stay in the processor's cache."""
_ROWS_A_READ = 16
"""A thread's share of rows, at least: fewer are read sooner than they are handed over."""
_MAPPED_BYTES = 1 << 30
"""Of pages that a process may have mapped before it lets go of them all: the system maps 16 pages for each one that is touched,
and would count them as this process's memory. They stay in the system's cache."""
_PAGES_A_TOUCH = 16 * mmap.PAGESIZE
_GATHERED_TOGETHER = _MAPPED_BYTES // _PAGES_A_TOUCH
"""Rows: the sample for the lists of 21 million, read at once, had 12 GB mapped."""


def row_bytes(dimension: int, kind: VectorType) -> int:
    """What a vector takes on disk."""
    return 2 * dimension if kind == "float16" else dimension + 4


def quantised(vectors: Vectors) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """8-bit numbers ``[rows, dimension]`` and the scale ``[rows]`` that each row is to be multiplied by."""
    scales = np.abs(vectors).max(axis=1) / np.float32(127)
    scales[scales == 0] = 1
    return np.rint(vectors / scales[:, None]).astype(np.int8), scales.astype(np.float32)


class VectorWriter:
    """Appends rows behind those that are kept.

    Args:
        folder: of the index.
        dimension: numbers a vector.
        kind: how they are kept.
        rows: what is kept already; whatever stands behind is cut off.

    Raises:
        OSError: the files cannot be written, or are shorter than what is said to be kept.
    """

    def __init__(self, folder: Path, dimension: int, kind: VectorType, rows: int) -> None:
        self._kind = kind
        self._vectors = AppendedFile(folder / VECTORS_NAME, rows * dimension * (2 if kind == "float16" else 1))
        try:
            self._scales = AppendedFile(folder / SCALES_NAME, 4 * rows) if kind == "int8" else None
        except OSError:
            self._vectors.close()
            raise

    def append(self, vectors: Vectors) -> None:
        """Writes rows ``[rows, dimension]``; they are safe from a kill, not from a power cut before :meth:`sync`."""
        if self._scales is None:
            self._vectors.write(vectors.astype("<f2").tobytes())
        else:
            numbers, scales = quantised(vectors)
            self._vectors.write(numbers.tobytes())
            self._scales.write(scales.astype("<f4").tobytes())

    def sync(self) -> None:
        """Puts on the disk what was written."""
        for file in (self._vectors, self._scales):
            if file is not None:
                file.sync()

    def close(self) -> None:
        """Lets go of the files."""
        for file in (self._vectors, self._scales):
            if file is not None:
                file.close()


class VectorFile:
    """The rows, mapped into memory; any number of processes share what the system has read of them.

    Args:
        folder: of the index.
        rows: vectors in it.
        dimension: numbers a vector.
        kind: how they are kept.
        readers: threads in which :meth:`scores` reads; None reads in the caller's.

    Raises:
        OSError: a file is missing or too short.
    """

    def __init__(
        self, folder: Path, rows: int, dimension: int, kind: VectorType, readers: tuple[Executor, int] | None = None
    ) -> None:
        self._path, self._dimension = folder / VECTORS_NAME, dimension
        dtype: Any = np.float16 if kind == "float16" else np.int8
        self._vectors: NDArray[Any] = np.memmap(self._path, dtype, "r", shape=(rows, dimension))
        self._scales = np.fromfile(folder / SCALES_NAME, "<f4", rows) if kind == "int8" else None
        self._mapping: mmap.mmap = getattr(self._vectors, "_mmap")  # noqa: B009  # numpy gives it no public name
        if hasattr(self._mapping, "madvise") and hasattr(mmap, "MADV_RANDOM"):
            self._mapping.madvise(mmap.MADV_RANDOM)  # else 128 KB are read for each row of 1.5 KB
        self._readers = readers
        self._touched = 0

    def __len__(self) -> int:
        return len(self._vectors)

    def gather(self, rows: Rows) -> Vectors:
        """The vectors of these rows, float32; of many, a part at a time, so that few pages are mapped at once."""
        out = np.empty((len(rows), self._dimension), np.float32)
        for first in range(0, len(rows), _GATHERED_TOGETHER):
            part = rows[first : first + _GATHERED_TOGETHER]
            out[first : first + len(part)] = self._as_numbers(self._read(part), part)
        return out

    def slabs(self, start: int = 0, stop: int | None = None, size: int = SLAB_ROWS) -> Iterator[tuple[int, Vectors]]:
        """All rows in their order, some at a time, each slab with the number of its first row."""
        stop, dtype = len(self) if stop is None else stop, self._vectors.dtype
        for first in range(start, stop, size):
            count = min(size, stop - first)
            # A plain read, not the mapping, which was told to read nothing ahead.
            part = np.fromfile(
                self._path, dtype, count * self._dimension, offset=first * self._dimension * dtype.itemsize
            )
            yield first, self._as_numbers(part.reshape(count, self._dimension), np.arange(first, first + count))

    def products(self, queries: Vectors, rows: Rows) -> tuple[Vectors, Vectors]:
        """Inner products of each query with its own candidates, and the squared lengths of these.

        Args:
            queries: ``[queries, dimension]``.
            rows: ``[queries, candidates]``.

        Returns:
            Two arrays ``[queries, candidates]``, float32.
        """
        kept = self._read(rows.ravel()).reshape(*rows.shape, -1)
        products, lengths = np.empty(rows.shape, np.float32), np.empty(rows.shape, np.float32)
        for first in range(0, len(rows), _QUERIES_TOGETHER):
            part = slice(first, first + _QUERIES_TOGETHER)
            numbers = kept[part].astype(np.float32)
            np.matmul(numbers, queries[part, :, None], out=products[part, :, None])
            np.einsum("qcd,qcd->qc", numbers, numbers, out=lengths[part])
        if self._scales is not None:
            scales = self._scales[rows]
            products, lengths = products * scales, lengths * scales**2
        return products, lengths

    def _as_numbers(self, kept: NDArray[Any], rows: Rows) -> Vectors:
        numbers = kept.astype(np.float32)
        return numbers if self._scales is None else numbers * self._scales[rows][:, None]

    def _read(self, rows: Rows) -> NDArray[Any]:
        """Rows as they are kept. The disk is asked by all readers at once: one after another, 50 rows took 6 ms."""
        out = np.empty((len(rows), self._dimension), self._vectors.dtype)
        executor, threads = self._readers or (None, 1)
        shares = min(threads, -(-len(rows) // _ROWS_A_READ))
        if executor is None or shares <= 1:
            self._take(rows, out)
        else:
            parts = zip(np.array_split(rows, shares), np.array_split(out, shares), strict=True)
            for _ in executor.map(lambda part: self._take(*part), parts):
                pass
        self._touched += len(rows) * _PAGES_A_TOUCH
        if self._touched > _MAPPED_BYTES:
            self._let_go()
        return out

    def _take(self, rows: Rows, out: NDArray[Any]) -> None:
        # Other modes than "raise" copy straight into `out`, and the interpreter's lock is let go meanwhile.
        np.take(self._vectors, rows, axis=0, out=out, mode="clip")

    def _let_go(self) -> None:
        self._touched = 0
        if hasattr(self._mapping, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)
