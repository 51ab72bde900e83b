"""Reads and checks the vectors of a Chroma collection from its HNSW files, without Chroma.

The layout, as observed in chromadb 0.5.23 (Python) and 1.5.9 (Rust), which write the same::

    header.bin               100 bytes: version, and the layout of a row
    data_level0.bin          one row per vector ever added: links, vector, label (not ordered by label)
    index_metadata.pickle    id to label; without deleted ids
    length.bin               vector lengths of a cosine collection, whose vectors are stored with length 1; noise for others
    link_lists.bin           links of the upper layers

They are checked before Chroma loads them, since it trusts them: zeroed vectors give wrong answers, and zeroed or truncated links
crash the process. Flipped bits in single vectors are only detected by checksums.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio.from_thread
import numpy as np
from numpy.typing import NDArray

from searchr1_async.search.embedders import Vectors

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

HEADER_NAME, ROWS_NAME, LENGTHS_NAME, LINKS_NAME = "header.bin", "data_level0.bin", "length.bin", "link_lists.bin"
FILE_NAMES = (HEADER_NAME, ROWS_NAME, LENGTHS_NAME, LINKS_NAME, LABELS_NAME)
WHOLE_BYTES = 512 << 20
"""Row files up to this size are checked in full."""
SPOT_ROWS = 2_048
SPOTS = 8
"""Parts of ``SPOT_ROWS`` rows checked of a larger file."""
MOST_ODD = 0.01
"""Share of rows: a zero vector may be a passage without any word known to the embedder, a row without links was deleted."""
_PART = 4_096
"""Rows checked at a time."""


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


def check_segment(folder: Path, dimension: int, *, is_cosine: bool, are_known: bool = False) -> HnswSegment:
    """Opens a segment after checking that its files fit together and that rows, links and labels are in range. Blocking.

    Files over :data:`WHOLE_BYTES` are checked in part.

    Args:
        folder: folder of the segment.
        dimension: dimension of the vectors, according to the database.
        is_cosine: whether vectors are stored with length 1.
        are_known: whether checksums have verified the vectors: then any number of them may be zero.

    Raises:
        BrokenSegmentError: the fault and its file.
        OSError: the files cannot be read.
    """
    for name in FILE_NAMES:
        if not (folder / name).is_file():
            raise BrokenSegmentError(f"{folder / name} is missing")
    header = Header.read(folder / HEADER_NAME, dimension)
    for name, least in ((ROWS_NAME, header.rows * header.row_bytes), (LENGTHS_NAME, 4 * header.rows)):
        if (size := (folder / name).stat().st_size) < least:
            raise BrokenSegmentError(f"{folder / name} is truncated: {size:,} bytes instead of {least:,}")
    _check_upper_links(folder / LINKS_NAME, header)
    segment = HnswSegment(folder, dimension)
    labels = _check_rows(folder / ROWS_NAME, header, dimension, is_cosine=is_cosine, are_known=are_known)
    if labels is not None:
        lost = ~np.isin(segment.labels.labels, labels)
        if lost.any():
            raise BrokenSegmentError(
                f"{folder / ROWS_NAME} lacks the vectors of {int(lost.sum()):,} of {len(lost):,} passages"
            )
    return segment


def _check_upper_links(path: Path, header: Header) -> None:
    """Checks the links above the lowest layer: per row their size in bytes, then the links; most rows have none."""
    words = np.fromfile(path, "<u4")
    of_layer = header.upper_links + 1
    layers = np.zeros(header.rows, np.int32)
    filled = np.flatnonzero(words)
    starts: list[tuple[int, int]] = []
    word = row = place = 0
    while place < len(filled):
        row += int(filled[place]) - word
        word = int(filled[place])
        count, rest = divmod(int(words[word]), 4 * of_layer)
        if rest or count > MOST_LAYERS or row >= header.rows:
            raise BrokenSegmentError(f"{path} is corrupt at byte {4 * word:,}")
        layers[row] = count
        starts.append((row, word + 1))
        word, row = word + 1 + count * of_layer, row + 1
        place = int(np.searchsorted(filled, word))
        if row % _PART == 0:
            anyio.from_thread.check_cancelled()
    if row + len(words) - word != header.rows or word > len(words) or path.stat().st_size % 4:
        raise BrokenSegmentError(
            f"{path} does not hold the links of {header.rows:,} rows: it is truncated, or from another index"
        )
    if layers.max(initial=0) != header.top_layer or layers[header.entry] != header.top_layer:
        raise BrokenSegmentError(
            f"{path} has {layers[header.entry]} layers of links at the entry point, the header states {header.top_layer}"
        )
    _check_targets(path, words, starts, layers, of_layer)


def _check_targets(
    path: Path, words: NDArray[np.uint32], starts: Sequence[tuple[int, int]], layers: NDArray[np.int32], of_layer: int
) -> None:
    """Checks that every link leads to a row in the same layer."""
    for layer in range(1, int(layers.max(initial=0)) + 1):
        first = np.array([start for row, start in starts if layers[row] >= layer], np.int64) + (layer - 1) * of_layer
        links = words[first[:, None] + np.arange(of_layer)]
        counts = links[:, 0] & 0xFFFF
        used = np.arange(of_layer - 1) < counts[:, None]
        targets = links[:, 1:][used]
        if (counts >= of_layer).any() or (targets >= len(layers)).any() or (layers[targets] < layer).any():
            raise BrokenSegmentError(f"{path} has links to missing rows, in layer {layer}")


def _check_rows(
    path: Path, header: Header, dimension: int, *, is_cosine: bool, are_known: bool
) -> NDArray[np.uint64] | None:
    """Checks rows and their links. Returns the labels of all rows; None if only some were checked."""
    layout = header.row_type(dimension)
    is_all = header.rows * header.row_bytes <= WHOLE_BYTES
    size = header.rows if is_all else min(SPOT_ROWS, header.rows)
    firsts = [0] if is_all else np.linspace(0, header.rows - size, SPOTS).astype(int).tolist()
    labels: list[NDArray[np.uint64]] = []
    seen = without_links = odd = 0
    for first in firsts:
        for start in range(first, first + size, _PART):
            anyio.from_thread.check_cancelled()
            count = min(_PART, first + size - start)
            rows = np.fromfile(path, layout, count, offset=start * header.row_bytes)
            counts = rows["links"][:, 0] & 0xFFFF
            targets = rows["links"][:, 1:][np.arange(header.lowest_links) < counts[:, None]]
            if (counts > header.lowest_links).any() or (targets >= header.rows).any():
                raise BrokenSegmentError(f"{path} has links to missing rows, in rows {start:,} to {start + count:,}")
            labels.append(rows["label"].copy())
            seen += count
            without_links += int((counts == 0).sum())
            odd += 0 if are_known else int(_are_odd(rows["vector"], is_cosine=is_cosine).sum())
    if odd > max(1, math.ceil(MOST_ODD * seen)):
        raise BrokenSegmentError(
            f"{path} has {odd:,} of {seen:,} vectors that are zero"
            f"{' or not of length 1, as they were written' if is_cosine else ' or not finite'}"
        )
    if header.rows > 1 and without_links > max(1, math.ceil(MOST_ODD * seen)):
        raise BrokenSegmentError(f"{path} has {without_links:,} of {seen:,} rows without links to others")
    return np.concatenate(labels) if is_all else None


def _are_odd(vectors: Vectors, *, is_cosine: bool) -> NDArray[np.bool_]:
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("vd,vd->v", vectors, vectors, dtype=np.float64)
    if is_cosine:
        return ~(np.abs(squares - 1) < 0.01)
    return ~np.isfinite(squares) | (squares == 0)
