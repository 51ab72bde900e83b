"""The full vectors of an index: rows of float16 or of 8-bit numbers in one file, read a few rows at a time from anywhere."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Iterator
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
_ASKED_TOGETHER = 16_384
"""Rows that the disk is asked for before the first is waited for."""


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
    """The rows. Any number of processes share what the system holds of them; a process has only what it reads at the moment.

    Rows are read, not mapped: the system maps what lies around a page that is touched too, up to 2 MB, and 12,800 rows of 1.5 KB
    had 3.9 GB counted as the process's memory. The disk is first asked for all rows of a call, which does not wait, then read:
    50 rows that nobody had read took 9 ms so, 11 ms by 16 threads, 14 ms one after another; 0.2 ms, 1.6 ms and 0.2 ms warm.

    Args:
        folder: of the index.
        rows: vectors in it.
        dimension: numbers a vector.
        kind: how they are kept.

    Raises:
        OSError: a file is missing or too short.
    """

    def __init__(self, folder: Path, rows: int, dimension: int, kind: VectorType) -> None:
        self._path, self._rows, self._dimension = folder / VECTORS_NAME, rows, dimension
        self._dtype: Any = np.dtype("<f2") if kind == "float16" else np.dtype(np.int8)
        self._row_bytes = dimension * self._dtype.itemsize
        self._scales: Vectors | None = None
        if kind == "int8":
            self._scales = np.fromfile(folder / SCALES_NAME, "<f4", rows)
            _refuse_short(folder / SCALES_NAME, 4 * rows)
        _refuse_short(self._path, rows * self._row_bytes)
        self._file = os.open(self._path, os.O_RDONLY)
        # With the last that holds it: a search that was abandoned may still read.
        weakref.finalize(self, os.close, self._file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # else 128 KB are read for each row

    def __len__(self) -> int:
        return self._rows

    def gather(self, rows: Rows, check: Callable[[], object] = lambda: None) -> Vectors:
        """The vectors of these rows, float32; ``check`` is called before every few thousand, and ends it by raising."""
        out = np.empty((len(rows), self._dimension), np.float32)
        for first in range(0, len(rows), _ASKED_TOGETHER):
            check()
            part = rows[first : first + _ASKED_TOGETHER]
            out[first : first + len(part)] = self._as_numbers(self._read(part), part)
        return out

    def slabs(self, start: int = 0, size: int = SLAB_ROWS) -> Iterator[tuple[int, Vectors]]:
        """All rows in their order, some at a time, each slab with the number of its first row."""
        for first in range(start, len(self), size):
            count = min(size, len(self) - first)
            # By a file of its own: the other one was told that nothing is read in order.
            part = np.fromfile(self._path, self._dtype, count * self._dimension, offset=first * self._row_bytes)
            yield first, self._as_numbers(part.reshape(count, self._dimension), np.arange(first, first + count))

    def products(self, queries: Vectors, rows: Rows) -> tuple[Vectors, Vectors]:
        """Inner products of each query with its own candidates, and the squared lengths of these.

        Args:
            queries: ``[queries, dimension]``.
            rows: ``[queries, candidates]``.

        Returns:
            Two arrays ``[queries, candidates]``, float32.
        """
        products, lengths = np.empty(rows.shape, np.float32), np.empty(rows.shape, np.float32)
        asked = max(1, _ASKED_TOGETHER // max(1, rows.shape[1]))
        for begin in range(0, len(rows), asked):
            kept = self._read(rows[begin : begin + asked].ravel()).reshape(-1, rows.shape[1], self._dimension)
            for first in range(0, len(kept), _QUERIES_TOGETHER):
                numbers = kept[first : first + _QUERIES_TOGETHER].astype(np.float32)
                part = slice(begin + first, begin + first + len(numbers))
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
        """Rows as they are kept."""
        out = np.empty((len(rows), self._dimension), self._dtype)
        size, places = self._row_bytes, (rows * self._row_bytes).tolist()
        if hasattr(os, "posix_fadvise"):
            for place in places:
                os.posix_fadvise(self._file, place, size, os.POSIX_FADV_WILLNEED)
        view = out.view(np.uint8).reshape(-1).data
        for number, place in enumerate(places):
            if os.preadv(self._file, [view[number * size : (number + 1) * size]], place) != size:
                raise OSError(errno.EIO, "became shorter while it was read", str(self._path))
        return out


def _refuse_short(path: Path, size: int) -> None:
    if (found := path.stat().st_size) < size:
        raise OSError(errno.EINVAL, f"has {found:,} bytes of {size:,}", str(path))
