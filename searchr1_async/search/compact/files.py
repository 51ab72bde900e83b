"""The rows of an index: full vectors (float16 or int8) and passages, appended during a build and read at random.

A passage is a JSON line, found by its byte offset in another file: it takes two reads, and any tool can open the file. Arrow
validates whole chunks on opening; Parquet reads a page per row.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.compact.layout import OFFSETS_NAME, PASSAGES_NAME, SCALES_NAME, VECTORS_NAME, VectorType
from searchr1_async.search.embedders import Vectors

Rows = NDArray[np.int64]
"""Row numbers, from 0."""
SLAB_ROWS = 65_536
"""Rows per read in a full scan: 200 MB as float32 at 768 dimensions."""
_QUERIES_TOGETHER = 8
"""Queries ranked at a time; their candidates fit the CPU cache."""
_ASKED_TOGETHER = 16_384
"""Rows requested from the disk ahead of the first read."""
OFFSET_BYTES = 8


class AppendedFile:
    """A file truncated to ``size`` bytes, then appended to.

    Raises:
        OSError: it cannot be opened, or is shorter.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._file = path.open("r+b" if path.exists() else "w+b")
        if self._file.seek(0, 2) < size:
            self._file.close()
            raise OSError(f"{path} is shorter than the recorded progress: delete the folder and start again")
        self._file.seek(size)
        self._file.truncate()

    def write(self, content: bytes) -> None:
        """Appends and flushes; survives a kill of the process."""
        self._file.write(content)
        self._file.flush()

    def sync(self) -> None:
        """Flushes to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def row_bytes(dimension: int, kind: VectorType) -> int:
    """Bytes per vector on disk."""
    return 2 * dimension if kind == "float16" else dimension + 4


def quantised(vectors: Vectors) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 values ``[rows, dimension]`` and the scale of each row, ``[rows]``."""
    scales = np.abs(vectors).max(axis=1) / np.float32(127)
    scales[scales == 0] = 1
    return np.rint(vectors / scales[:, None]).astype(np.int8), scales.astype(np.float32)


class VectorWriter:
    """Appends rows after those already kept.

    Args:
        folder: index folder.
        dimension: numbers per vector.
        kind: storage type.
        rows: rows already kept; anything after them is truncated.

    Raises:
        OSError: the files cannot be written, or are shorter than ``rows``.
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
        """Writes ``[n, dimension]``. Survives a kill; surviving a power cut takes :meth:`sync`."""
        if self._scales is None:
            self._vectors.write(vectors.astype("<f2").tobytes())
        else:
            numbers, scales = quantised(vectors)
            self._vectors.write(numbers.tobytes())
            self._scales.write(scales.astype("<f4").tobytes())

    def sync(self) -> None:
        """Flushes to disk."""
        for file in (self._vectors, self._scales):
            if file is not None:
                file.sync()

    def close(self) -> None:
        for file in (self._vectors, self._scales):
            if file is not None:
                file.close()


class VectorFile:
    """Random access to the vectors, shared between processes through the page cache.

    Rows are read, not mapped: touching a mapped page maps up to 2 MB around it, all counted as the process's memory. All rows of
    a call are first requested with ``posix_fadvise``, which does not block, then read.

    Args:
        folder: index folder.
        rows: number of vectors.
        dimension: numbers per vector.
        kind: storage type.

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
        # Closed with the last reference: an abandoned search may still be reading.
        weakref.finalize(self, os.close, self._file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead of 128 KB per row

    def __len__(self) -> int:
        return self._rows

    def gather(self, rows: Rows, check: Callable[[], object] = lambda: None) -> Vectors:
        """The vectors of these rows, float32; ``check`` is called every few thousand rows and may raise to abort."""
        out = np.empty((len(rows), self._dimension), np.float32)
        for first in range(0, len(rows), _ASKED_TOGETHER):
            check()
            part = rows[first : first + _ASKED_TOGETHER]
            out[first : first + len(part)] = self._as_numbers(self._read(part), part)
        return out

    def slabs(self, start: int = 0, size: int = SLAB_ROWS) -> Iterator[tuple[int, Vectors]]:
        """All rows in order, in slabs, each with the number of its first row."""
        for first in range(start, len(self), size):
            count = min(size, len(self) - first)
            # A separate file handle: the other is advised for random access.
            part = np.fromfile(self._path, self._dtype, count * self._dimension, offset=first * self._row_bytes)
            yield first, self._as_numbers(part.reshape(count, self._dimension), np.arange(first, first + count))

    def products(self, queries: Vectors, rows: Rows) -> tuple[Vectors, Vectors]:
        """Inner products of each query with its candidates, and the candidates' squared lengths.

        Args:
            queries: ``[queries, dimension]``.
            rows: ``[queries, candidates]``.

        Returns:
            Two float32 arrays ``[queries, candidates]``.
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
        """Rows in their storage type."""
        out = np.empty((len(rows), self._dimension), self._dtype)
        size, places = self._row_bytes, (rows * self._row_bytes).tolist()
        if hasattr(os, "posix_fadvise"):
            for place in places:
                os.posix_fadvise(self._file, place, size, os.POSIX_FADV_WILLNEED)
        view = out.view(np.uint8).reshape(-1).data
        for number, place in enumerate(places):
            if os.preadv(self._file, [view[number * size : (number + 1) * size]], place) != size:
                raise OSError(errno.EIO, "was truncated during a read", str(self._path))
        return out


def _refuse_short(path: Path, size: int) -> None:
    if (found := path.stat().st_size) < size:
        raise OSError(errno.EINVAL, f"has {found:,} bytes of {size:,}", str(path))


class PassageWriter:
    """Appends passages after those already kept.

    Args:
        folder: index folder.
        rows: rows already kept; anything after them is truncated.

    Raises:
        OSError: the files cannot be written, or are shorter than ``rows``.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self._offsets = AppendedFile(folder / OFFSETS_NAME, OFFSET_BYTES * (rows + 1) if rows else 0)
        self._end = 0
        if rows:
            self._end = int(np.fromfile(folder / OFFSETS_NAME, "<u8", 1, offset=OFFSET_BYTES * rows)[0])
        else:
            self._offsets.write(bytes(OFFSET_BYTES))
        try:
            self._lines = AppendedFile(folder / PASSAGES_NAME, self._end)
        except OSError:
            self._offsets.close()
            raise

    def append(self, passages: Sequence[Passage]) -> None:
        """Writes passages. They survive a kill; surviving a power cut takes :meth:`sync`."""
        lines = [_line(passage) for passage in passages]
        ends = self._end + np.cumsum([len(line) for line in lines], dtype=np.uint64)
        self._lines.write(b"".join(lines))
        self._offsets.write(ends.astype("<u8").tobytes())
        self._end = int(ends[-1]) if lines else self._end

    def sync(self) -> None:
        """Flushes to disk."""
        self._lines.sync()
        self._offsets.sync()

    def close(self) -> None:
        self._lines.close()
        self._offsets.close()


class PassageFile:
    """Random access to the passages.

    Args:
        folder: index folder.
        rows: number of passages.

    Raises:
        OSError: a file is missing.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self._name = str(folder / PASSAGES_NAME)
        self._offsets = np.memmap(folder / OFFSETS_NAME, "<u8", "r", shape=(rows + 1,))
        self._file = (folder / PASSAGES_NAME).open("rb", buffering=0)

    def read(self, row: int, score: float = 0.0) -> Passage:
        """The passage of a row, with the given score.

        Raises:
            StoreError: the file is corrupt at this row.
        """
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        try:
            own_id, title, text = orjson.loads(os.pread(self._file.fileno(), end - start, start))
            return Passage(own_id, title, text, score)
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{self._name} is corrupt at row {row:,}: verify the index, or copy it again") from error

    def close(self) -> None:
        self._file.close()


def _line(passage: Passage) -> bytes:
    fields = [passage.id, passage.title, passage.text]
    try:
        return orjson.dumps(fields) + b"\n"
    except orjson.JSONEncodeError:  # lone surrogates are not valid UTF-8
        return orjson.dumps([field.encode("utf-8", "replace").decode() for field in fields]) + b"\n"
