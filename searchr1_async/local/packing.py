"""Sequences packed into rows, and attention over them.

Prefill and training pack sequences, so that each distinct (position, prefix) token is computed once: group members share
their prompt and all episodes the system prompt. A causal model's state depends only on the preceding tokens, so one row
serves all sequences that agree up to it, with the same log-probabilities and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from searchr1_async.local.backend import common_prefix_length
from searchr1_async.local.transformer import Shape

_QUERY_BLOCK = 512
"""Queries per block of attention: bounds the mask (queries times keys) and skips the keys after the block."""
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


class TreeAttention:
    """Each segment attends to its cached past, its preceding rows, and causally to itself."""

    def __init__(
        self, packed: Packed, shape: Shape, *, past: Mapping[int, Tensor] | None = None, keep: Tensor | None = None
    ) -> None:
        """``past[i]`` [2, layers, tokens, kv_heads, size]: cached keys and values of sequence i.

        Those of every row are written to ``keep`` [2, layers, rows, kv_heads, size].
        """
        self._segments = packed.segments
        self._lengths = [segment.stop - segment.start for segment in packed.segments]
        self._index = {segment.start: i for i, segment in enumerate(packed.segments)}
        self._past = past or {}
        self._groups = shape.heads // shape.kv_heads
        self._kv_heads = shape.kv_heads
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._keep = keep

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._keep is not None:
            self._keep[0, layer], self._keep[1, layer] = k, v
        keys, values = k.split(self._lengths), v.split(self._lengths)
        outputs = [
            self._attend(queries, self._context(segment, layer, 0, keys), self._context(segment, layer, 1, values))
            for segment, queries in zip(self._segments, q.split(self._lengths), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _context(self, segment: Segment, layer: int, which: int, pieces: tuple[Tensor, ...]) -> Tensor:
        """All keys (``which`` 0) or values (1) visible to a segment, [1, kv_heads, tokens, size]."""
        parts = []
        if segment.past is not None:
            parts.append(self._past[segment.past][which, layer, : segment.past_length])
        for start, stop in (*segment.context, (segment.start, segment.stop)):
            piece = pieces[self._index[start]]
            parts.append(piece if len(piece) == stop - start else piece[: stop - start])
        # Training keeps what is attended to. A view would keep the keys and values of all segments, queries included.
        tokens = parts[0] if len(parts) == 1 and not parts[0].requires_grad else torch.cat(parts)
        return tokens.transpose(0, 1).unsqueeze(0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, before = len(q), k.shape[2] - len(q)
        blocks = []
        for start in range(0, rows, _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, rows)
            seen = before + stop
            block = q if rows <= _QUERY_BLOCK else q[start:stop]
            # Stack the heads of a key group as additional queries instead of repeating the keys.
            grouped = block.view(len(block), self._kv_heads, self._groups, -1).permute(1, 2, 0, 3)
            grouped = grouped.reshape(1, self._kv_heads, self._groups * len(block), -1)
            mask = None if len(block) == 1 else self._mask(len(block), seen, q)
            out = functional.scaled_dot_product_attention(grouped, k[:, :, :seen], v[:, :, :seen], attn_mask=mask)
            out = out.view(self._kv_heads, self._groups, len(block), -1).permute(2, 0, 1, 3)
            blocks.append(out.reshape(len(block), -1))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _mask(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """[groups · queries, keys]: causal, with the last query seeing every key."""
        mask = self._masks.get((queries, keys, like.dtype))
        if mask is None:
            square = torch.full((queries, keys), float("-inf"), dtype=like.dtype, device=like.device)
            mask = square.triu_(keys - queries + 1).repeat(self._groups, 1)
            self._masks[queries, keys, like.dtype] = mask
        return mask
