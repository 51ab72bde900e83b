"""Attention over packed sequences (see :mod:`searchr1_async.local.packing`), for prefill and training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from searchr1_async.local.packing import Packed, Segment
from searchr1_async.local.transformer import Shape

# Queries per block: bounds the mask (queries times keys) and skips the keys after the block.
_QUERY_BLOCK = 512


class TreeAttention:
    """Each segment attends to its cached past, its preceding rows, and causally to itself."""

    def __init__(
        self, packed: Packed, shape: Shape, *, past: Mapping[int, Tensor] | None = None, keep: bool = False
    ) -> None:
        """``past[i]`` [2, layers, tokens, kv_heads, size]: cached keys and values of sequence i.

        ``keep`` collects every layer's keys and values in :attr:`kept`, each [rows, kv_heads, size].
        """
        self._segments = packed.segments
        self._lengths = [segment.stop - segment.start for segment in packed.segments]
        self._index = {segment.start: i for i, segment in enumerate(packed.segments)}
        self._past = past or {}
        self._groups = shape.heads // shape.kv_heads
        self._kv_heads = shape.kv_heads
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self.kept: list[tuple[Tensor, Tensor]] | None = [] if keep else None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kept is not None:
            self.kept.append((k, v))
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
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
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
