"""Whether the HNSW files of a Chroma collection can be what Chroma wrote: looked at before Chroma loads them.

Chroma trusts these files. Of vectors that were zeroed it answers others, and zeroed or cut links end the process. What is wrong with
single vectors (flipped bits) only checksums tell.
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
"""A file of rows of at most this size is looked at whole: 54,272 rows of 384 numbers (98 MB) take 0.2 s."""
SPOT_ROWS = 2_048
SPOTS = 8
"""So many parts of so many rows are looked at of a larger file."""
MOST_ODD = 0.01
"""Of the rows: a vector of zeros may be a passage without a word that the embedder knows, a row without links was deleted."""
_PART = 4_096
"""Rows looked at together."""


def check_segment(folder: Path, dimension: int, *, is_cosine: bool, are_known: bool = False) -> HnswSegment:
    """In a thread: the segment, where its files fit together, and no row, link or label of them is out of its range.

    Of files over :data:`WHOLE_BYTES` some parts are looked at.

    Args:
        folder: of the segment.
        dimension: numbers a vector, as the database says.
        is_cosine: its vectors are kept at length 1.
        are_known: its vectors are those that were written, as checksums say: any number of them may be zero.

    Raises:
        BrokenSegmentError: the fault, with the file that it is in.
        OSError: they cannot be read.
    """
    for name in FILE_NAMES:
        if not (folder / name).is_file():
            raise BrokenSegmentError(f"{folder / name} is missing")
    header = Header.read(folder / HEADER_NAME, dimension)
    for name, least in ((ROWS_NAME, header.rows * header.row_bytes), (LENGTHS_NAME, 4 * header.rows)):
        if (size := (folder / name).stat().st_size) < least:
            raise BrokenSegmentError(f"{folder / name} is cut short: {size:,} bytes in place of {least:,}")
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
    """For each row the bytes of its links above the lowest layer, and these links: of most rows none."""
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
            raise BrokenSegmentError(f"{path} is broken at byte {4 * word:,}")
        layers[row] = count
        starts.append((row, word + 1))
        word, row = word + 1 + count * of_layer, row + 1
        place = int(np.searchsorted(filled, word))
        if row % _PART == 0:
            anyio.from_thread.check_cancelled()
    if row + len(words) - word != header.rows or word > len(words) or path.stat().st_size % 4:
        raise BrokenSegmentError(
            f"{path} does not hold the links of {header.rows:,} rows: cut short, or another index's"
        )
    if layers.max(initial=0) != header.top_layer or layers[header.entry] != header.top_layer:
        raise BrokenSegmentError(
            f"{path} has {layers[header.entry]} layers of links where the search begins, the header says {header.top_layer}"
        )
    _check_targets(path, words, starts, layers, of_layer)


def _check_targets(
    path: Path, words: NDArray[np.uint32], starts: Sequence[tuple[int, int]], layers: NDArray[np.int32], of_layer: int
) -> None:
    """Every link leads to a row that is in the same layer."""
    for layer in range(1, int(layers.max(initial=0)) + 1):
        first = np.array([start for row, start in starts if layers[row] >= layer], np.int64) + (layer - 1) * of_layer
        links = words[first[:, None] + np.arange(of_layer)]
        counts = links[:, 0] & 0xFFFF
        used = np.arange(of_layer - 1) < counts[:, None]
        targets = links[:, 1:][used]
        if (counts >= of_layer).any() or (targets >= len(layers)).any() or (layers[targets] < layer).any():
            raise BrokenSegmentError(f"{path} holds links that lead nowhere, in layer {layer}")


def _check_rows(
    path: Path, header: Header, dimension: int, *, is_cosine: bool, are_known: bool
) -> NDArray[np.uint64] | None:
    """The labels of all rows; None where only some were looked at."""
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
                raise BrokenSegmentError(
                    f"{path} holds links that lead nowhere, in rows {start:,} to {start + count:,}"
                )
            labels.append(rows["label"].copy())
            seen += count
            without_links += int((counts == 0).sum())
            odd += 0 if are_known else int(_are_odd(rows["vector"], is_cosine=is_cosine).sum())
    if odd > max(1, math.ceil(MOST_ODD * seen)):
        raise BrokenSegmentError(
            f"{path} holds {odd:,} vectors of {seen:,} that are zero"
            f"{' or not of length 1, as they were written' if is_cosine else ' or not finite'}"
        )
    if header.rows > 1 and without_links > max(1, math.ceil(MOST_ODD * seen)):
        raise BrokenSegmentError(f"{path} holds {without_links:,} rows of {seen:,} without links to others")
    return np.concatenate(labels) if is_all else None


def _are_odd(vectors: Vectors, *, is_cosine: bool) -> NDArray[np.bool_]:
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("vd,vd->v", vectors, vectors, dtype=np.float64)
    if is_cosine:
        return ~(np.abs(squares - 1) < 0.01)
    return ~np.isfinite(squares) | (squares == 0)
