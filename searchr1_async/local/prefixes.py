"""Packs sequences with shared prefixes so that each distinct (position, prefix) token is computed once.

Group members share their prompt and all episodes the system prompt. A causal model's state depends only on the preceding
tokens, so one row serves all sequences that agree up to it, with the same log-probabilities and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows added by one sequence; they attend to ``context``, then causally to themselves."""

    start: int
    stop: int
    context: tuple[tuple[int, int], ...]
    """Row ranges [start, stop) of the preceding tokens, in order."""
    past: int | None = None
    """Index of the sequence whose cached tokens precede ``context``, if any."""
    past_length: int = 0


@dataclass(frozen=True, slots=True)
class PackedPrefix:
    """One sequence as cached tokens followed by row ranges."""

    past: int | None
    past_length: int
    ranges: tuple[tuple[int, int], ...]

    def cut(self, length: int) -> PackedPrefix:
        """The first ``length`` tokens."""
        ranges, left = [], length - self.past_length
        for start, stop in self.ranges:
            if left <= 0:
                break
            ranges.append((start, min(stop, start + left)))
            left -= stop - start
        kept = min(self.past_length, length)
        return PackedPrefix(self.past if kept else None, kept, tuple(ranges))

    def rows(self) -> Int64Array:
        """The row of each token after the cached ones."""
        return np.concatenate([np.arange(a, b) for a, b in self.ranges] or [np.empty(0, np.int64)]).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Packed:
    tokens: Int64Array
    """[rows]"""
    positions: Int64Array
    """[rows]"""
    segments: tuple[Segment, ...]
    paths: tuple[PackedPrefix, ...]
    """One per sequence, in input order."""


def common_prefix_length(a: NDArray[np.integer], b: NDArray[np.integer]) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def lexicographic_order(sequences: Sequence[NDArray[np.integer]]) -> list[int]:
    """Indices in lexicographic order, which makes sequences with a shared prefix neighbours."""
    # Big-endian bytes of non-negative integers compare as the integers do.
    keys = [np.ascontiguousarray(sequence, dtype=">i4").tobytes() for sequence in sequences]
    return sorted(range(len(sequences)), key=keys.__getitem__)


def pack(sequences: Sequence[NDArray[np.integer]], cached: Sequence[int] | None = None) -> Packed:
    """Pack ``sequences``; the first ``cached[i]`` tokens of each get no rows."""
    known = cached or [0] * len(sequences)
    paths: list[PackedPrefix | None] = [None] * len(sequences)
    segments: list[Segment] = []
    tokens: list[NDArray[np.integer]] = []
    positions: list[Int64Array] = []
    rows, previous = 0, -1
    for index in lexicographic_order(sequences):
        sequence, begin = sequences[index], known[index]
        prefix = PackedPrefix(index if begin else None, begin, ())
        if previous >= 0 and (shared := common_prefix_length(sequences[previous], sequence)) > begin:
            begin = shared
            before = paths[previous]
            assert before is not None
            prefix = before.cut(shared)
        new = len(sequence) - begin
        if new:
            segments.append(Segment(rows, rows + new, prefix.ranges, prefix.past, prefix.past_length))
            tokens.append(sequence[begin:])
            positions.append(np.arange(begin, len(sequence)))
            prefix = PackedPrefix(prefix.past, prefix.past_length, (*prefix.ranges, (rows, rows + new)))
        paths[index] = prefix
        rows += new
        previous = index
    return Packed(
        np.concatenate(tokens or [np.empty(0)]).astype(np.int64),
        np.concatenate(positions or [np.empty(0)]).astype(np.int64),
        tuple(segments),
        tuple(path for path in paths if path is not None),
    )


def micro_batches(sequences: Sequence[NDArray[np.integer]], max_rows: int) -> list[list[int]]:
    """Indices in batches of at most ``max_rows`` distinct tokens (a longer sequence gets its own batch)."""
    batches: list[list[int]] = []
    rows, previous = 0, -1
    for index in lexicographic_order(sequences):
        sequence = sequences[index]
        new = len(sequence)
        if batches:
            new -= common_prefix_length(sequences[previous], sequence)
        if not batches or rows + new > max_rows:
            batches.append([])
            rows, new = 0, len(sequence)
        batches[-1].append(index)
        rows += new
        previous = index
    return batches
