"""Reads the vectors of a Chroma collection from its HNSW files, without Chroma.

The layout, as observed in chromadb 0.5.23 (Python) and 1.5.9 (Rust), which write the same::

    header.bin               100 bytes: version, and the layout of a row
    data_level0.bin          one row per vector ever added: links, vector, label (not ordered by label)
    index_metadata.pickle    id to label; without deleted ids
    length.bin               vector lengths of a cosine collection, whose vectors are stored with length 1; noise for others
    link_lists.bin           links of the upper layers
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio.from_thread
import numpy as np
from numpy.typing import NDArray

from searchr1_async.search.embedders.base import Vectors

LABELS_NAME = "index_metadata.pickle"
_HEADER = struct.Struct("<i6QiI3QdQ")
"""Version, offset of layer 0, capacity, rows, bytes per row, label offset, vector offset, top layer, entry point, maximum links per
row in upper layers and in the lowest, and settings."""
_VERSION = 1
MOST_LAYERS = 64
SCANNED_ROWS = 16_384
"""Rows whose labels are read at a time: 52 MB of file at 768 dimensions. Their vectors are usually needed next."""
_HASH_BYTES = 8
_REPORTED = 10_000
# Pickle opcodes (see pickletools), with the number of bytes that follow.
_TEXTS = {0x8C: 1, ord("X"): 4, 0x8D: 8}
"""SHORT_BINUNICODE, BINUNICODE, BINUNICODE8: bytes of the length prefix."""
_LONG1 = 0x8A
_INTEGERS = {ord("K"): 1, ord("M"): 2, ord("J"): 4, _LONG1: 0}
_SIGNED = frozenset({ord("J"), _LONG1})
_EMPTY_DICT = ord("}")
_SKIPPED = {
    **dict.fromkeys(
        b"(Nsu)\x81\x93\x94", 0
    ),  # MARK, NONE, SETITEM, SETITEMS, EMPTY_TUPLE, NEWOBJ, STACK_GLOBAL, MEMOIZE
    **dict.fromkeys(b"\x80q", 1),  # PROTO, BINPUT
    ord("r"): 4,  # LONG_BINPUT
    0x95: 8,  # FRAME
}


class BrokenSegmentError(Exception):
    """The files are not an HNSW index of a supported layout. Callers turn the message into their own error."""


@dataclass(frozen=True, slots=True)
class Header:
    """The contents of ``header.bin``."""

    rows: int
    row_bytes: int
    label: int
    """Byte offset in a row; likewise ``vector``."""
    vector: int
    top_layer: int
    entry: int
    """Row where every search starts, in the top layer."""
    upper_links: int
    """Maximum links per row in each upper layer."""
    lowest_links: int

    @classmethod
    def read(cls, path: Path, dimension: int) -> Header:
        """Reads the header of an index.

        Raises:
            BrokenSegmentError: unsupported version, another dimension, or corrupt.
            OSError: it cannot be read.
        """
        content = path.read_bytes()
        if len(content) != _HEADER.size or (values := _HEADER.unpack(content))[0] != _VERSION:
            raise BrokenSegmentError(f"{path} has an unsupported version")
        _, first, room, rows, size, label, vector, top, entry, upper, lowest, *_ = values
        if first != 0 or vector != 4 * (lowest + 1) or label != vector + 4 * dimension or size != label + 8:
            raise BrokenSegmentError(f"{path} is not for vectors of dimension {dimension}")
        if not (0 < rows <= room and entry < rows and 0 <= top <= MOST_LAYERS and upper > 0):
            raise BrokenSegmentError(
                f"{path} is corrupt: {rows:,} rows, capacity {room:,}, entry {entry:,} in layer {top}"
            )
        return cls(rows, size, label, vector, top, entry, upper, lowest)

    def row_type(self, dimension: int) -> np.dtype:
        """A row of ``data_level0.bin``; the low half of its first link word is the number of links."""
        return np.dtype(
            {
                "names": ["links", "vector", "label"],
                "formats": [("<u4", (self.lowest_links + 1,)), ("<f4", (dimension,)), "<u8"],
                "offsets": [0, self.vector, self.label],
                "itemsize": self.row_bytes,
            }
        )


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels by the hash of their id: 16 bytes per id."""

    hashes: NDArray[np.uint64]
    """Sorted."""
    labels: NDArray[np.int64]
    max_seq_id: int | None
    """The last change in the files; None for newer versions, which record it in the database."""

    def of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """The label of each id; -1 if not in the index."""
        wanted = np.frombuffer(b"".join(map(_hash, ids)), "<u8")
        if not len(self.hashes):
            return np.full(len(ids), -1, np.int64)
        places = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        return np.where(self.hashes[places] == wanted, self.labels[places], -1)


def _hash(own_id: str) -> bytes:
    return hashlib.blake2b(own_id.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest()


def read_labels(path: Path) -> Labels:
    """Reads ids and labels from an ``index_metadata.pickle``. Blocking. Never unpickles; keeps only hashes and labels.

    Raises:
        BrokenSegmentError: not written by Chroma.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            hashes, labels, max_seq_id = _scan(content)
    except (ValueError, IndexError, OverflowError) as error:
        raise BrokenSegmentError(f"{path} was not written by Chroma ({error})") from error
    found = np.frombuffer(hashes, "<u8")
    order = np.argsort(found)
    found = found[order]
    if (found[1:] == found[:-1]).any():  # a collision has odds of 1 in 80,000 for 21 million ids
        raise BrokenSegmentError(f"{path} has a duplicate id, or two ids with the same hash")
    return Labels(found, np.frombuffer(labels, np.int64)[order], max_seq_id)


def _scan(content: mmap.mmap) -> tuple[bytearray, array[int], int | None]:
    """Id hashes, labels, and the last change. Reads a pickle opcode by opcode, to the end of its ``id_to_label``.

    ``pickletools.genops`` would take minutes for millions of ids.

    Raises:
        ValueError, IndexError, OverflowError: an unexpected opcode, or an early end.
    """
    hashes, labels = bytearray(), array("q")
    max_seq_id: int | None = None
    text: bytes | None = None
    is_within = False
    position = 0
    while True:
        opcode = content[position]
        position += 1
        if (skipped := _SKIPPED.get(opcode)) is not None:
            position += skipped
        elif (width := _TEXTS.get(opcode)) is not None:
            end = position + width + int.from_bytes(content[position : position + width], "little")
            text = content[position + width : end]
            position = end
        elif (width := _INTEGERS.get(opcode)) is not None:
            if opcode == _LONG1:
                width = content[position]
                position += 1
            number = int.from_bytes(content[position : position + width], "little", signed=opcode in _SIGNED)
            position += width
            if is_within:
                if text is None:
                    raise ValueError("a label without an id")
                hashes += hashlib.blake2b(text, digest_size=_HASH_BYTES).digest()
                labels.append(number)
                if len(labels) % _REPORTED == 0:
                    let_go(content)
                    anyio.from_thread.check_cancelled()
            elif text == b"max_seq_id":
                max_seq_id = number
            text = None
        elif opcode == _EMPTY_DICT:
            if is_within:
                return hashes, labels, max_seq_id
            is_within = text == b"id_to_label"
        else:
            raise ValueError(f"opcode {opcode} at {position - 1:,}")


class HnswSegment:
    """The vectors of a collection, by label. All methods block: call them in a worker thread, one at a time.

    Args:
        folder: folder of the segment.
        dimension: dimension of the vectors, according to the database.

    Raises:
        BrokenSegmentError: unsupported layout, another dimension, or truncated files.
        OSError: the files cannot be read.
    """

    def __init__(self, folder: Path, dimension: int) -> None:
        self.labels = read_labels(folder / LABELS_NAME)
        self._path = folder / "data_level0.bin"
        self._map, self._rows = _mapped(folder / "header.bin", self._path, dimension)
        most = int(self.labels.labels.max(initial=0))
        if most > 2 * len(self._rows) + SCANNED_ROWS or int(self.labels.labels.min(initial=0)) < 0:
            raise BrokenSegmentError(f"{self._path} holds {len(self._rows)} vectors, but labels go up to {most}")
        self._row_of = np.full(most + 1, -1, np.int32)
        self._unread = list(range(-(-len(self._rows) // SCANNED_ROWS)))

    def vectors(self, labels: NDArray[np.int64]) -> Vectors:
        """The vector of each label; of length 1 in a cosine collection.

        Raises:
            BrokenSegmentError: a vector is missing.
        """
        rows = self._rows_of(labels)
        found = self._rows["vector"][rows].astype(np.float32)
        let_go(self._map)
        return found

    def _rows_of(self, labels: NDArray[np.int64]) -> NDArray[np.int32]:
        """Labels follow insertion order and threads reorder rows only within a batch, so a row is near its label."""
        guess = int(labels.min(initial=0)) // SCANNED_ROWS
        for part in sorted(self._unread, key=lambda part: abs(part - guess)):
            if (self._row_of[labels] >= 0).all():
                break
            first = part * SCANNED_ROWS
            found = self._rows["label"][first : first + SCANNED_ROWS].astype(np.int64)
            known = found < len(self._row_of)  # the last rows added may be deleted
            self._row_of[found[known]] = np.arange(first, first + len(found), dtype=np.int32)[known]
            self._unread.remove(part)
            let_go(self._map)
            anyio.from_thread.check_cancelled()
        rows = self._row_of[labels]
        if (rows < 0).any():
            raise BrokenSegmentError(f"{self._path} has no vector for label {labels[np.argmin(rows)]}")
        return rows


def let_go(mapped: mmap.mmap) -> None:
    """Releases pages that were read, which would count as this process's memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _mapped(header: Path, path: Path, dimension: int) -> tuple[mmap.mmap, np.ndarray]:
    found = Header.read(header, dimension)
    if path.stat().st_size < found.rows * found.row_bytes:
        raise BrokenSegmentError(
            f"{path} is truncated: {path.stat().st_size:,} bytes instead of {found.rows * found.row_bytes:,}"
        )
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return mapped, np.frombuffer(mapped, found.row_type(dimension), found.rows)


def stacked(vectors: Iterable[bytes], dimension: int) -> Vectors:
    """Stacks vectors of the write-ahead log.

    Raises:
        BrokenSegmentError: one has another dimension.
    """
    found = list(vectors)
    if any(len(vector) != 4 * dimension for vector in found):
        raise BrokenSegmentError(f"the write-ahead log has vectors whose dimension is not {dimension}")
    return np.frombuffer(b"".join(found), "<f4").reshape(len(found), dimension).astype(np.float32)
