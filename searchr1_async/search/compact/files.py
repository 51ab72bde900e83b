"""The files of a compact index: its manifest, and its rows, which are appended during a build and read at random.

One folder, read-only once complete::

    manifest.json      description, provenance, and checksums of the other files
    codes.faiss        centres of the inverted lists, in faiss's format
    lists.bin          per list, its 1-bit codes (RaBitQ) and their rows; memory-mapped
    lists.sizes        codes per list: int64, little-endian
    vectors.bin        full vectors by row, float16; used to re-rank candidates
    passages.jsonl     passages, one ``["id", "title", "text"]`` per line
    passages.offsets   byte offset of each line, and of the end: uint64, little-endian
    building/          present only during a build (:mod:`.assembly`)
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from searchr1_async.boundary.paths import write_atomically
from searchr1_async.boundary.settings import Count, check_settings
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.vector_store import FileRecord, Metric

COMPACT_FORMAT: Literal[2] = 2
MANIFEST_NAME = "manifest.json"
CODES_NAME = "codes.faiss"
LISTS_NAME = "lists.bin"
SIZES_NAME = "lists.sizes"
VECTORS_NAME = "vectors.bin"
PASSAGES_NAME = "passages.jsonl"
OFFSETS_NAME = "passages.offsets"
BUILDING_NAME = "building"
FILE_NAMES = (CODES_NAME, LISTS_NAME, SIZES_NAME, VECTORS_NAME, PASSAGES_NAME, OFFSETS_NAME)
"""All files of an index besides the manifest."""

Positive = Annotated[int, msgspec.Meta(ge=1)]
Rows = NDArray[np.int64]
"""Row numbers, from 0."""
SLAB_ROWS = 65_536
"""Rows per read in a full scan: 200 MB as float32 at 768 dimensions."""
_QUERIES_TOGETHER = 8
"""Queries ranked at a time; their candidates fit the CPU cache."""
_ASKED_TOGETHER = 16_384
"""Rows requested from the disk ahead of the first read."""


@dataclass(frozen=True, slots=True)
class CompactSettings:
    """Build settings of a compact index. Raises ConfigurationError if one is out of range."""

    recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Target share of the exact 3 nearest passages. Calibration may exceed it while queries stay cheap."""
    lists: Count | None = None
    """Inverted lists; None uses :func:`~searchr1_async.search.compact.codes.lists_for`."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Measurement of one choice of probes and candidates, as in :class:`Calibration`."""

    probes: Positive
    most_probes: Positive
    margin: float | None
    candidates: Positive
    recall_at_3: float
    queries_per_second: float
    """Batched, with a warm page cache, on the build machine."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The chosen probes and candidates, measured on so many sample queries, and the measurements behind the choice."""

    queries: int
    origin: str
    """``"queries"`` (given by the user) or ``"passages"`` (of the index, each excluded from its own results)."""
    probes: Positive
    """Mean inverted lists searched per query; ``most_probes`` are the most."""
    most_probes: Positive
    margin: Annotated[float, msgspec.Meta(ge=0)] | None
    """A list is searched if its :func:`gap <searchr1_async.search.compact.codes.centre_distances>` is at most this; None: no limit."""
    candidates: Positive
    """Passages nearest by their codes, re-ranked by their full vectors."""
    recall: float
    """On the sample, at ``recall_at`` results; ``asked`` is the target."""
    asked: float
    recall_at: int
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True, slots=True)
class CompactManifest:
    """Describes a compact index."""

    created: str
    """UTC, ISO 8601."""
    passages: Positive
    dimension: Positive
    metric: Metric
    lists: Positive
    source: str
    source_fingerprint: str
    embedder: str | None
    """As accepted by :func:`~searchr1_async.search.gemini.make_embedder`; None: the caller has to name it."""
    embedder_fingerprint: str | None
    files: dict[str, FileRecord]
    calibration: Calibration
    vectors: Literal["float16"] = "float16"
    versions: dict[str, str] = field(default_factory=dict)
    """faiss and numpy versions."""
    kind: Literal["searchr1_async compact index"] = "searchr1_async compact index"
    format: Literal[2] = COMPACT_FORMAT

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` atomically, which completes the index. Raises OSError."""
        write_atomically(folder / MANIFEST_NAME, msgspec.json.format(msgspec.json.encode(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> CompactManifest:
        """Loads the manifest of a complete index. Raises StoreError."""
        path = folder / MANIFEST_NAME
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            state = f"no compact index ({path} cannot be read: {error.strerror or error})"
            if (folder / BUILDING_NAME).is_dir():
                state = "an unfinished compact index: run the build command again"
            raise StoreError(f"{folder} holds {state}", is_fatal=True) from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            problem = f"{path} is corrupt, or not the manifest of a compact index of format {COMPACT_FORMAT} ({error})"
            advice = "name another folder, or rebuild it"
            if "'int8'" in str(error):
                problem, advice = f"{folder} was made by version 0.1 with int8 vectors", "delete it and build it again"
            raise StoreError(f"{problem}: {advice}", is_fatal=True) from error
        if missing := sorted(set(FILE_NAMES) - found.files.keys()):
            raise StoreError(f"{path} is corrupt (it does not list {', '.join(missing)})", is_fatal=True)
        return found

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    @property
    def fingerprint(self) -> str:
        """Equal for equal content, wherever it is stored."""
        return "-".join(["compact", *(f"{record.blocks[:16]}{record.blocks[-16:]}" for record in self.files.values())])


class AppendedFiles:
    """Files to which a build appends rows, after the ``sizes`` in bytes that were kept. Raises StoreError if a file is shorter.

    What is written survives a kill; surviving a power cut takes :meth:`sync`.
    """

    def __init__(self, sizes: Mapping[Path, int]) -> None:
        for path, size in sizes.items():
            if size and path.stat().st_size < size:
                raise StoreError(f"{path} is shorter than the recorded progress: delete the folder and start again")
        self._files = [path.open("ab") for path in sizes]
        for file, size in zip(self._files, sizes.values(), strict=True):
            file.truncate(size)

    def write(self, *contents: bytes) -> None:
        for file, content in zip(self._files, contents, strict=True):
            file.write(content)
            file.flush()

    def sync(self) -> None:
        for file in self._files:
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files:
            file.close()


class RowWriter(AppendedFiles):
    """Appends passages and their vectors after the first ``rows`` in the folder. Raises OSError."""

    def __init__(self, folder: Path, dimension: int, rows: int) -> None:
        offsets = folder / OFFSETS_NAME
        # Where the offset is missing, the file is shorter than it is opened for.
        self._end = int(sum(np.fromfile(offsets, "<u8", 1, offset=8 * rows))) if rows else 0
        sizes = {folder / PASSAGES_NAME: self._end, offsets: 8 * (rows + 1) if rows else 0}
        super().__init__({**sizes, folder / VECTORS_NAME: 2 * rows * dimension})
        if not rows:
            self.write(b"", bytes(8), b"")

    def append(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        """Writes passages and their vectors, ``[passages, dimension]``."""
        lines = [_encoded(passage) + b"\n" for passage in passages]
        ends = self._end + np.cumsum([len(line) for line in lines], dtype=np.uint64)
        self.write(b"".join(lines), ends.astype("<u8").tobytes(), vectors.astype("<f2").tobytes())
        self._end = int(ends[-1]) if lines else self._end


def _encoded(passage: Passage) -> bytes:
    fields = [passage.id, passage.title, passage.text]
    try:
        return msgspec.json.encode(fields)
    except UnicodeEncodeError:  # lone surrogates are not valid UTF-8
        return msgspec.json.encode([field.encode("utf-8", "replace").decode() for field in fields])


class VectorFile:
    """Random access to the ``rows`` vectors of an index folder, shared between processes through the page cache. Raises OSError.

    Rows are read, not mapped: touching a mapped page maps up to 2 MB around it, all counted as the process's memory.
    """

    def __init__(self, folder: Path, rows: int, dimension: int) -> None:
        self._path, self._rows, self._dimension, self._row_bytes = folder / VECTORS_NAME, rows, dimension, 2 * dimension
        if self._path.stat().st_size < rows * self._row_bytes:
            raise StoreError(f"{self._path} has fewer than {rows:,} rows: delete the folder and start again")
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
            out[first : first + len(part)] = self._read(part)
        return out

    def slabs(self, start: int = 0, size: int = SLAB_ROWS) -> Iterator[tuple[int, Vectors]]:
        """All rows in order, in slabs, each with the number of its first row."""
        for first in range(start, len(self), size):
            count = min(size, len(self) - first)
            # A separate file handle: the other is advised for random access.
            part = np.fromfile(self._path, "<f2", count * self._dimension, offset=first * self._row_bytes)
            yield first, part.reshape(count, self._dimension).astype(np.float32)

    def products(self, queries: Vectors, rows: Rows) -> tuple[Vectors, Vectors]:
        """Inner products of queries ``[n, dimension]`` with their candidates ``rows[n, candidates]``, and the candidates' squared lengths.

        Both are float32, ``[n, candidates]``.
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
        return products, lengths

    def _read(self, rows: Rows) -> NDArray[np.float16]:
        out = np.empty((len(rows), self._dimension), "<f2")
        size, places = self._row_bytes, (rows * self._row_bytes).tolist()
        if hasattr(os, "posix_fadvise"):  # requests all of them at once; does not block
            for place in places:
                os.posix_fadvise(self._file, place, size, os.POSIX_FADV_WILLNEED)
        view = out.view(np.uint8).reshape(-1).data
        for number, place in enumerate(places):
            if os.preadv(self._file, [view[number * size : (number + 1) * size]], place) != size:
                raise OSError(errno.EIO, "was truncated during a read", str(self._path))
        return out


_decoder = msgspec.json.Decoder(tuple[str, str, str])


class PassageFile:
    """Random access to the ``rows`` passages of an index folder. Raises OSError."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._name = str(folder / PASSAGES_NAME)
        self._offsets = np.memmap(folder / OFFSETS_NAME, "<u8", "r", shape=(rows + 1,))
        self._file = (folder / PASSAGES_NAME).open("rb", buffering=0)

    def read(self, row: int, score: float = 0.0) -> Passage:
        """The passage of a row, with the given score. Raises StoreError if the file is corrupt there."""
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        try:
            fields = _decoder.decode(os.pread(self._file.fileno(), end - start, start))
            return Passage(*fields, score)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise StoreError(f"{self._name} is corrupt at row {row:,}: copy the index again, or rebuild it") from error

    def close(self) -> None:
        self._file.close()
