"""The full vectors of an index: float16 or int8 rows in one file, with random access.

An append-only file that resumes from a known size.

On-disk layout of a compact index: one folder, read-only once complete.

::

    <folder>/manifest.json      description, provenance, and checksums of the other files
    <folder>/codes.faiss        centres of the inverted lists, in faiss's format
    <folder>/lists.bin          per list, its 1-bit codes (RaBitQ) and their rows; memory-mapped
    <folder>/lists.sizes        codes per list: int64, little-endian
    <folder>/vectors.bin        full vectors by row, float16 or int8; used to re-rank candidates
    <folder>/scales.bin         for int8 vectors: one float32 per row
    <folder>/passages.jsonl     passages, one ``["id", "title", "text"]`` per line
    <folder>/passages.offsets   byte offset of each line, and of the end: uint64, little-endian
    <folder>/building/          present only during a build (:mod:`.build`)

The passages of an index: JSON lines in one file, byte offsets in another.

A passage takes two reads, and any tool can open the file. Arrow validates whole chunks on opening; Parquet reads a page per row.
"""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from searchr1_async.boundary.paths import write_atomically
from searchr1_async.boundary.settings import Count, Range, check_settings
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.vector_store import FileRecord, Metric


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


COMPACT_KIND = "searchr1_async compact index"
COMPACT_FORMAT = 2
MANIFEST_NAME = "manifest.json"
CODES_NAME = "codes.faiss"
LISTS_NAME = "lists.bin"
SIZES_NAME = "lists.sizes"
VECTORS_NAME = "vectors.bin"
SCALES_NAME = "scales.bin"
PASSAGES_NAME = "passages.jsonl"
OFFSETS_NAME = "passages.offsets"
BUILDING_NAME = "building"

VectorType = Literal["float16", "int8"]


def file_names(vectors: VectorType) -> list[str]:
    """All files of an index besides the manifest."""
    names = [CODES_NAME, LISTS_NAME, SIZES_NAME, VECTORS_NAME, PASSAGES_NAME, OFFSETS_NAME]
    return [*names, SCALES_NAME] if vectors == "int8" else names


@dataclass(frozen=True, slots=True)
class CompactSettings:
    """Build settings of a compact index.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    vectors: VectorType = "float16"
    """Storage of the full vectors: ``"float16"`` (2 bytes per number, 32 GB for 21 million of 768) or ``"int8"`` (half)."""
    lists: Count | None = None
    """Inverted lists; None uses :func:`~searchr1_async.search.compact.codes.lists_for`."""
    recall: Annotated[float, Range(over=0, at_most=1)] = 0.95
    """Target share of the exact ``recall_at`` nearest passages. Calibration may exceed it while queries stay cheap."""
    recall_at: Annotated[int, Range(at_least=1, at_most=100)] = 3
    """Usual number of results per search."""
    threads: Count | None = None
    """faiss threads during the build; None uses one per core."""
    seed: int = 1
    """Seed of samples and clusters."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Measurement of one choice of probes and candidates on the sample queries."""

    probes: int
    """Mean inverted lists searched per query."""
    most_probes: int
    margin: float | None
    """See :class:`Calibration`."""
    candidates: int
    recall_at_3: float
    recall_at_10: float
    recall: float
    """At ``recall_at``."""
    queries_per_second: float
    """Batched, with a warm page cache, on the build machine."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The chosen probes and candidates, and the measurements behind the choice."""

    queries: int
    """Sample queries."""
    origin: str
    """``"queries"`` (given by the user) or ``"passages"`` (of the index, each excluded from its own results; easier than real queries)."""
    probes: int
    """Mean inverted lists searched per query."""
    most_probes: int
    """Maximum lists searched per query."""
    margin: float | None
    """A list is searched if its :func:`gap <searchr1_async.search.compact.codes.gaps>` is at most this; None: no limit."""
    candidates: int
    """Passages nearest by their codes, re-ranked by their full vectors."""
    recall: float
    """Measured with this choice on the sample."""
    asked: float
    recall_at: int
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True, slots=True)
class CompactManifest:
    """Describes a compact index."""

    created: str
    """UTC, ISO 8601."""
    passages: int
    dimension: int
    metric: Metric
    vectors: VectorType
    lists: int
    seed: int
    source: str
    source_fingerprint: str
    embedder: str | None
    """As accepted by :func:`~searchr1_async.search.gemini.make_embedder`; None: the caller has to name it."""
    embedder_fingerprint: str | None
    files: Mapping[str, FileRecord]
    calibration: Calibration
    versions: Mapping[str, str] = field(default_factory=dict)
    """faiss and numpy versions."""

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` atomically, which completes the index.

        Raises:
            OSError: the folder cannot be written.
        """
        values = {"kind": COMPACT_KIND, "format": COMPACT_FORMAT, **asdict(self)}
        write_atomically(folder / MANIFEST_NAME, json.dumps(values, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> CompactManifest:
        """Loads the manifest of a complete index.

        Raises:
            StoreError: it is missing, corrupt, from another program or of another format version.
        """
        path = folder / MANIFEST_NAME
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            if values.pop("kind", None) != COMPACT_KIND:
                raise StoreError(
                    f"{path} is not the manifest of a compact index: name a folder that holds one", is_fatal=True
                )
            if (written := values.pop("format")) != COMPACT_FORMAT:
                raise StoreError(
                    f"{folder} is a compact index of format {written}, but this version of the package reads format "
                    f"{COMPACT_FORMAT}: rebuild it, or install the version that built it",
                    is_fatal=True,
                )
            values = {name: values[name] for name in (each.name for each in fields(cls)) if name in values}
            files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
            chosen = values.pop("calibration")
            curve = tuple(CurvePoint(**point) for point in chosen.pop("curve"))
            found = cls(**values, files=files, calibration=Calibration(**chosen, curve=curve))
            found._refuse_nonsense()
            return found
        except FileNotFoundError as error:
            begun = (folder / BUILDING_NAME).is_dir()
            raise StoreError(
                f"{folder} holds an unfinished compact index: run the build command again"
                if begun
                else f"{folder} holds no compact index (no {MANIFEST_NAME})",
                is_fatal=True,
            ) from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}", is_fatal=True) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"{path} is corrupt ({type(error).__name__}: {error})", is_fatal=True) from error

    def _refuse_nonsense(self) -> None:
        chosen = self.calibration
        numbers = (self.passages, self.dimension, self.lists, chosen.probes, chosen.most_probes, chosen.candidates)
        sizes = [record.bytes for record in self.files.values()]
        if not all(isinstance(number, int) and number >= 1 for number in (*numbers, *sizes)):
            raise ValueError("a count is not an integer, or is below 1")
        if chosen.margin is not None and not chosen.margin >= 0:
            raise ValueError(f"the margin is {chosen.margin!r}")
        if not all(isinstance(record.blocks, str) for record in self.files.values()):
            raise ValueError("checksums are not strings")
        if self.vectors not in ("float16", "int8") or self.metric not in ("cosine", "l2", "ip"):
            raise ValueError(f"vectors are {self.vectors!r}, the metric is {self.metric!r}")
        if missing := sorted(set(file_names(self.vectors)) - self.files.keys()):
            raise ValueError(f"it does not list {', '.join(missing)}")

    @property
    def fingerprint(self) -> str:
        """Equal for equal content, wherever it is stored."""
        return "-".join(["compact", *(f"{record.blocks[:16]}{record.blocks[-16:]}" for record in self.files.values())])


Rows = NDArray[np.int64]
"""Row numbers, from 0."""

SLAB_ROWS = 65_536
"""Rows per read in a full scan: 200 MB as float32 at 768 dimensions."""
_QUERIES_TOGETHER = 8
"""Queries ranked at a time; their candidates fit the CPU cache."""
_ASKED_TOGETHER = 16_384
"""Rows requested from the disk ahead of the first read."""


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


OFFSET_BYTES = 8


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
