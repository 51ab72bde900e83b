"""The vectors of a Chroma collection as they lie in its folder: the files of its HNSW index, read without opening Chroma.

Seen of chromadb 0.5.23 (Python) and 1.5.9 (Rust), which write them alike::

    header.bin               100 bytes: version, and where things stand in a row
    data_level0.bin          a row each vector ever added: links, the vector, and its label (rows are in no order of labels)
    index_metadata.pickle    which label is which id's; of a deleted id there is none
    length.bin               lengths of the vectors of a cosine collection, which are kept at length 1; noise for others
    link_lists.bin           the upper layers' links
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
"""Version, offset of layer 0, room, rows, bytes a row, offset of the label, offset of the vector, top layer, entry, links of a row
above the lowest layer and in it, and settings."""
_VERSION = 1
MOST_LAYERS = 64
SCANNED_ROWS = 16_384
"""Rows whose labels are read together: 52 MB of file at 768 dimensions. Their vectors are wanted next."""
_HASH_BYTES = 8
_REPORTED = 10_000
# Opcodes of pickle, as pickletools describes them, with the bytes that follow.
_TEXTS = {0x8C: 1, ord("X"): 4, 0x8D: 8}
"""SHORT_BINUNICODE, BINUNICODE, BINUNICODE8: bytes of the length before the text."""
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
    """Files that are no HNSW index of a layout known here; its message is meant for the caller's typed error."""


@dataclass(frozen=True, slots=True)
class Header:
    """What ``header.bin`` says of the other files."""

    rows: int
    row_bytes: int
    label: int
    """Where it is in a row, in bytes; so with the vector."""
    vector: int
    top_layer: int
    entry: int
    """The row at which every search begins, in the top layer."""
    upper_links: int
    """Of a row at most, in each layer above the lowest."""
    lowest_links: int

    @classmethod
    def read(cls, path: Path, dimension: int) -> Header:
        """The header of an index of such vectors.

        Raises:
            BrokenSegmentError: it is of another version, of other vectors, or broken.
            OSError: it cannot be read.
        """
        content = path.read_bytes()
        if len(content) != _HEADER.size or (values := _HEADER.unpack(content))[0] != _VERSION:
            raise BrokenSegmentError(f"{path} is not one of a version known here")
        _, first, room, rows, size, label, vector, top, entry, upper, lowest, *_ = values
        if first != 0 or vector != 4 * (lowest + 1) or label != vector + 4 * dimension or size != label + 8:
            raise BrokenSegmentError(f"{path} is not that of vectors of {dimension} numbers")
        if not (0 < rows <= room and entry < rows and 0 <= top <= MOST_LAYERS and upper > 0):
            raise BrokenSegmentError(
                f"{path} is broken: {rows:,} rows in room for {room:,}, entry {entry:,} in layer {top}"
            )
        return cls(rows, size, label, vector, top, entry, upper, lowest)

    def row_type(self, dimension: int) -> np.dtype:
        """A row of ``data_level0.bin``; the lower half of its first link is the number of the others."""
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
    """Which label is which id's: 16 bytes an id, by the hash of it."""

    hashes: NDArray[np.uint64]
    """Sorted."""
    labels: NDArray[np.int64]
    max_seq_id: int | None
    """The last change that is in the files; None in those of newer versions, which keep it in the database."""

    def of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """The label of each id; -1 for one that is not in the index."""
        wanted = np.frombuffer(b"".join(map(_hash, ids)), "<u8")
        if not len(self.hashes):
            return np.full(len(ids), -1, np.int64)
        places = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        return np.where(self.hashes[places] == wanted, self.labels[places], -1)


def _hash(own_id: str) -> bytes:
    return hashlib.blake2b(own_id.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest()


def read_labels(path: Path) -> Labels:
    """In a thread: the ids of an ``index_metadata.pickle``. Nothing in it is run, and nothing kept of it but hashes and labels.

    Raises:
        BrokenSegmentError: not what Chroma writes.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            hashes, labels, max_seq_id = _scan(content)
    except (ValueError, IndexError, OverflowError) as error:
        raise BrokenSegmentError(f"{path} is not what Chroma writes ({error})") from error
    found = np.frombuffer(hashes, "<u8")
    order = np.argsort(found)
    found = found[order]
    if (found[1:] == found[:-1]).any():  # by chance, 1 in 80,000 for 21 million ids
        raise BrokenSegmentError(f"{path} names an id twice, or two ids of one hash")
    return Labels(found, np.frombuffer(labels, np.int64)[order], max_seq_id)


def _scan(content: mmap.mmap) -> tuple[bytearray, array[int], int | None]:
    """Hashes of ids, their labels, and the last change, of a pickle opcode by opcode, to the end of its ``id_to_label``.

    ``pickletools.genops`` does the same in 16 us an id, six minutes for 21 million.

    Raises:
        ValueError, IndexError, OverflowError: another opcode than Chroma's pickles have there, or an early end.
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
    """The vectors of a collection, by id. All functions block on the disk: call them in a worker thread, one at a time.

    Args:
        folder: of the segment.
        dimension: numbers a vector, as the database says.

    Raises:
        BrokenSegmentError: files of another layout, of another dimension, or cut short.
        OSError: they cannot be read.
    """

    def __init__(self, folder: Path, dimension: int) -> None:
        self.labels = read_labels(folder / LABELS_NAME)
        self._path = folder / "data_level0.bin"
        self._map, self._rows = _mapped(folder / "header.bin", self._path, dimension)
        most = int(self.labels.labels.max(initial=0))
        if most > 2 * len(self._rows) + SCANNED_ROWS or int(self.labels.labels.min(initial=0)) < 0:
            raise BrokenSegmentError(f"{self._path} holds {len(self._rows)} vectors, and their labels reach {most}")
        self._row_of = np.full(most + 1, -1, np.int32)
        self._unread = list(range(-(-len(self._rows) // SCANNED_ROWS)))

    def vectors(self, labels: NDArray[np.int64]) -> Vectors:
        """The vector of each label, of length 1 in a cosine collection.

        Raises:
            BrokenSegmentError: it holds one of them no more.
        """
        rows = self._rows_of(labels)
        found = self._rows["vector"][rows].astype(np.float32)
        let_go(self._map)
        return found

    def _rows_of(self, labels: NDArray[np.int64]) -> NDArray[np.int32]:
        """Labels were given in the order of adding, and threads put the rows of one batch in any order: a row is near its label."""
        guess = int(labels.min(initial=0)) // SCANNED_ROWS
        for part in sorted(self._unread, key=lambda part: abs(part - guess)):
            if (self._row_of[labels] >= 0).all():
                break
            first = part * SCANNED_ROWS
            found = self._rows["label"][first : first + SCANNED_ROWS].astype(np.int64)
            known = found < len(self._row_of)  # the last ones added may be deleted
            self._row_of[found[known]] = np.arange(first, first + len(found), dtype=np.int32)[known]
            self._unread.remove(part)
            let_go(self._map)
            anyio.from_thread.check_cancelled()
        rows = self._row_of[labels]
        if (rows < 0).any():
            raise BrokenSegmentError(f"{self._path} holds no vector of label {labels[np.argmin(rows)]}")
        return rows


def let_go(mapped: mmap.mmap) -> None:
    """Pages that were read count as this process's memory until the system wants them back; they are not read again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _mapped(header: Path, path: Path, dimension: int) -> tuple[mmap.mmap, np.ndarray]:
    found = Header.read(header, dimension)
    if path.stat().st_size < found.rows * found.row_bytes:
        raise BrokenSegmentError(
            f"{path} holds {path.stat().st_size:,} bytes where {found.rows * found.row_bytes:,} are told: cut short"
        )
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return mapped, np.frombuffer(mapped, found.row_type(dimension), found.rows)


def stacked(vectors: Iterable[bytes], dimension: int) -> Vectors:
    """Vectors of the write-ahead log.

    Raises:
        BrokenSegmentError: one has another dimension.
    """
    found = list(vectors)
    if any(len(vector) != 4 * dimension for vector in found):
        raise BrokenSegmentError(f"the write-ahead log holds vectors that have not {dimension} numbers")
    return np.frombuffer(b"".join(found), "<f4").reshape(len(found), dimension).astype(np.float32)
