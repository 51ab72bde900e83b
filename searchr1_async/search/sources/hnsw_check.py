"""Checks the HNSW files of a Chroma collection before Chroma loads them.

Chroma trusts these files: zeroed vectors give wrong answers, and zeroed or truncated links crash the process. Flipped bits in single
vectors are only detected by checksums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import anyio.from_thread
import numpy as np
from numpy.typing import NDArray

from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.sources.hnsw_segment import LABELS_NAME, MOST_LAYERS, BrokenSegmentError, Header, HnswSegment

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
