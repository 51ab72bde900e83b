"""Keys and values of sequences: of the running ones, and of those that have ended, which a later prompt may continue.

Each sequence has one copy, in a slot. A running sequence's slot takes part in decoding. When the sequence ends, its slot is parked
with its tokens: a prompt that continues them takes the slot over, so that the next turn of an episode copies nothing. Any other
prompt copies the longest prefix that it shares with a slot. Beyond the capacity, parked slots are dropped, least recently used first.
"""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from searchr1_async.local.backend import Int32Array, common_prefix_length
from searchr1_async.local.transformer import Shape

_SMALLEST_CAPACITY = 256
_MOST_SLOTS_AT_FIRST = 128
_UNUSED_BYTES = 2 << 30
"""Size of a new pool on a CPU, at most: slots take no memory before they are used, and a pool that grows is copied."""
_ROOM_AFTER_PROMPT = 128
"""Tokens that a sequence has room for after its prompt. Most end within it; a longer one moves, which takes some milliseconds."""


@dataclass(eq=False, slots=True)
class Slot:
    """The cached tokens of one sequence."""

    pool: _Pool
    index: int
    tokens: Int32Array
    """Those that a prompt may share: the prompt of a running sequence, all cached tokens of a parked one."""
    owner: Callable[[], Hashable | None] | None
    """Refers to the weights, weakly; None: the base model."""
    used: int
    length: int = 0
    """Cached tokens."""

    @property
    def running(self) -> bool:
        return self.index < self.pool.running

    def belongs_to(self, owner: Hashable | None) -> bool:
        return self.owner is None if owner is None else self.owner is not None and self.owner() is owner


class _Pool:
    """Slots of one capacity in one tensor [2, layers, slots, kv_heads, capacity, size], the running ones at the front."""

    def __init__(self, shape: Shape, capacity: int, like: Tensor, first_slots: int) -> None:
        self._shape = shape
        self._like = like
        self._first_slots = first_slots
        self.capacity = capacity
        self.slots: list[Slot] = []
        self.running = 0
        self._memory: mmap.mmap | None = None
        self.kv = self._zeros(0)

    def add(self, slot: Slot) -> None:
        """Appends a slot, parked."""
        count = self.kv.shape[2]
        if len(self.slots) == count:
            grown = self._zeros(max(self._first_slots, 2 * count))
            for old in self.slots:
                grown[:, :, old.index, :, : old.length] = self.kv[:, :, old.index, :, : old.length]
            self.kv = grown
        slot.pool, slot.index = self, len(self.slots)
        self.slots.append(slot)

    def start(self, slot: Slot) -> None:
        self._swap(slot.index, self.running)
        self.running += 1

    def park(self, slot: Slot) -> None:
        self.running -= 1
        self._swap(slot.index, self.running)

    def remove(self, slot: Slot) -> None:
        """Removes a parked slot."""
        self._swap(slot.index, len(self.slots) - 1)
        self.slots.pop()
        if not self.slots:
            self.kv = self._zeros(0)

    def _swap(self, i: int, j: int) -> None:
        if i == j:
            return
        first, second = self.slots[i], self.slots[j]
        kept = self.kv[:, :, i, :, : first.length].clone()
        self.kv[:, :, i, :, : second.length] = self.kv[:, :, j, :, : second.length]
        self.kv[:, :, j, :, : first.length] = kept
        self.slots[i], self.slots[j] = second, first
        second.index, first.index = i, j

    def _zeros(self, slots: int) -> Tensor:
        """Zeros that, on a CPU, take memory only once something is written to them."""
        shape = self._shape
        sizes = (2, shape.layers, slots, shape.kv_heads, self.capacity, shape.head_size)
        self._memory = None
        if not slots or self._like.device.type != "cpu":
            return self._like.new_zeros(sizes)
        # Private where there is a choice: pages of shared memory cannot be given back.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._memory = mmap.mmap(-1, math.prod(sizes) * self._like.element_size(), **private)
        return torch.frombuffer(self._memory, dtype=self._like.dtype).view(sizes)

    def give_back(self) -> None:
        """Returns the memory of unused slots to the system, where it can be returned; they are zero again."""
        if self._memory is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        layers, count = self.kv.shape[1:3]
        slot_bytes = len(self._memory) // (2 * layers * count)
        for plane in range(2 * layers):
            start = -(-(plane * count + len(self.slots)) * slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            # Whole pages only: the system would round up, into the next plane.
            stop = (plane + 1) * count * slot_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                self._memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


@dataclass(frozen=True, slots=True)
class Places:
    """A pool's part of a decoding step, in numpy."""

    keys: NDArray[np.float32]
    """[layers, slots, kv_heads, capacity, size], as :attr:`values`."""
    values: NDArray[np.float32]
    slots: NDArray[np.int64]
    """Of each row."""
    places: NDArray[np.int64]
    """Of each row, in its slot."""


class KvCache:
    """Slots in pools by capacity (256, 512, 1024, … tokens), of which each takes one attention call.

    A sequence that outgrows its pool moves to the next one, so that a long sequence does not pad all the others.
    """

    def __init__(self, shape: Shape, like: Tensor, capacity_bytes: int) -> None:
        """``like`` gives dtype and device; running sequences may exceed ``capacity_bytes``."""
        self._shape = shape
        self._like = like
        self._pools: dict[int, _Pool] = {}
        self._clock = itertools.count()
        self.bytes_per_token = shape.cache_bytes(like.dtype)
        self.capacity = capacity_bytes // self.bytes_per_token
        """Tokens."""

    @property
    def tokens(self) -> int:
        """Cached tokens of all slots."""
        return sum(slot.length for slot in self._slots())

    def find(self, owner: Hashable | None, tokens: Int32Array) -> tuple[Slot | None, int]:
        """The slot that shares the longest prefix with ``tokens``, and the length of that prefix."""
        best, length = None, 0
        for slot in self._slots():
            known = slot.tokens
            if len(known) <= length or not slot.belongs_to(owner):
                continue
            if length == len(tokens):
                break
            if known[length] == tokens[length] and (shared := common_prefix_length(known, tokens)) > length:
                best, length = slot, shared
        if best is not None:
            best.used = next(self._clock)
        return best, length

    def open(self, owner: Hashable | None, prompt: Int32Array, keep: Collection[Slot] = ()) -> Slot:
        """An empty running slot for the prompt and what follows; drops parked ones for it, but none of ``keep``."""
        self._drop_parked(len(prompt), keep)
        pool = self._pool_for(self._room_for(prompt))
        reference = None if owner is None else weakref.ref(owner)
        slot = Slot(pool, len(pool.slots), prompt, reference, next(self._clock))
        pool.add(slot)
        pool.start(slot)
        return slot

    def resume(self, slot: Slot, prompt: Int32Array) -> None:
        """A parked slot runs again, for a prompt that begins with its tokens."""
        slot.tokens, slot.used = prompt, next(self._clock)
        slot.pool.start(slot)
        self._move_if_below(slot, self._room_for(prompt))

    def park(self, slot: Slot, tokens: Int32Array) -> None:
        """A running slot ends, and keeps its state for ``tokens``: of the last it may have none, of wrong guesses after them it has."""
        slot.length = min(slot.length, len(tokens))
        slot.tokens, slot.used = tokens[: slot.length], next(self._clock)
        slot.pool.park(slot)
        self._drop_parked(0, ())

    def drop(self, slot: Slot) -> None:
        """Drops a running slot, and wipes it: masked values are multiplied by zero, which would propagate NaN."""
        slot.pool.kv[:, :, slot.index] = 0.0
        slot.pool.park(slot)
        slot.pool.remove(slot)

    def shrink(self) -> None:
        """Drops all parked slots and gives their memory back."""
        for slot in [slot for slot in self._slots() if not slot.running]:
            slot.pool.remove(slot)
        self.give_back()

    def give_back(self) -> None:
        """Returns the memory of unused slots to the system."""
        for pool in self._pools.values():
            pool.give_back()

    def empty(self, tokens: int) -> Tensor:
        """Room for the keys and values of so many tokens, [2, layers, tokens, kv_heads, size], outside of any slot."""
        shape = self._shape
        return self._like.new_empty(2, shape.layers, tokens, shape.kv_heads, shape.head_size)

    def fill(self, slot: Slot, start: int, kv: Tensor) -> None:
        """Writes ``kv`` [2, layers, tokens, kv_heads, size] from token ``start`` on."""
        stop = start + kv.shape[2]
        slot.pool.kv[:, :, slot.index, :, start:stop] = kv.transpose(2, 3)
        slot.length = max(slot.length, stop)

    def read(self, slot: Slot) -> Tensor:
        """A view [2, layers, tokens, kv_heads, size] of a slot's tokens."""
        return slot.pool.kv[:, :, slot.index, :, : slot.length].transpose(2, 3)

    def make_room(self, slots: Sequence[Slot], tokens: int = 1) -> None:
        """Each slot gets room for so many more tokens."""
        for slot in slots:
            self._move_if_below(slot, slot.length + tokens)

    def batch_order(self) -> list[Slot]:
        """All running slots, in :class:`DecodeAttention`'s row order."""
        return [slot for _, pool in sorted(self._pools.items()) for slot in pool.slots[: pool.running]]

    def attention(self, tokens: int = 1) -> DecodeAttention:
        """For so many new tokens of each running slot."""
        return DecodeAttention([pool for _, pool in sorted(self._pools.items()) if pool.running], self._shape, tokens)

    def places(self, tokens: int) -> list[Places]:
        """Where so many new tokens of each running slot go, in :meth:`batch_order`. On a CPU only."""
        out = []
        for _, pool in sorted(self._pools.items()):
            if pool.running:
                lengths = np.array([slot.length for slot in pool.slots[: pool.running]])
                places = (lengths[:, None] + np.arange(tokens)).reshape(-1)
                keys, values = pool.kv.numpy()
                out.append(Places(keys, values, np.arange(pool.running).repeat(tokens), places))
        return out

    def _slots(self) -> Iterator[Slot]:
        return (slot for pool in self._pools.values() for slot in pool.slots)

    def _drop_parked(self, new_tokens: int, keep: Collection[Slot]) -> None:
        """Drops parked slots: those whose weights are gone, and the least recently used ones beyond the capacity."""
        parked = [slot for slot in self._slots() if not slot.running and slot not in keep]
        excess = self.tokens + new_tokens - self.capacity
        for slot in sorted(parked, key=lambda slot: slot.used):
            if excess > 0 or (slot.owner is not None and slot.owner() is None):
                slot.pool.remove(slot)
                excess -= slot.length

    def _move_if_below(self, slot: Slot, tokens: int) -> None:
        """Moves a running slot to a pool with room for ``tokens``, if its own has less."""
        old = slot.pool
        if tokens <= old.capacity:
            return
        kv = self.read(slot).clone()
        old.park(slot)
        old.remove(slot)
        new = self._pool_for(tokens)
        new.add(slot)
        new.start(slot)
        self.fill(slot, 0, kv)

    def _room_for(self, prompt: Int32Array) -> int:
        return min(len(prompt) + _ROOM_AFTER_PROMPT, self._shape.context)

    def _pool_for(self, tokens: int) -> _Pool:
        capacity = _SMALLEST_CAPACITY
        while capacity < tokens:
            capacity *= 2
        pool = self._pools.get(capacity)
        if pool is None:
            tokens = _UNUSED_BYTES // self.bytes_per_token if self._like.device.type == "cpu" else self.capacity
            first_slots = min(max(4, tokens // capacity), _MOST_SLOTS_AT_FIRST)
            pool = self._pools[capacity] = _Pool(self._shape, capacity, self._like, first_slots)
        return pool


class DecodeAttention:
    """Appends the keys and values of T new tokens to every running slot; each attends to the slot's tokens up to itself.

    Rows are ordered by slot, then by token. The slots' lengths stay as they are.
    """

    def __init__(self, pools: Sequence[_Pool], shape: Shape, tokens: int) -> None:
        self._shape = shape
        self._tokens = tokens
        self._parts = [self._part(pool) for pool in pools]
        self._rows = [part.pool.running * tokens for part in self._parts]

    def _part(self, pool: _Pool) -> _Part:
        device, dtype = pool.kv.device, pool.kv.dtype
        lengths = [slot.length for slot in pool.slots[: pool.running]]
        places_ST = torch.tensor(lengths, device=device).unsqueeze(1) + torch.arange(self._tokens, device=device)
        longest = max(lengths) + self._tokens
        hidden_STN = torch.arange(longest, device=device) > places_ST.unsqueeze(2)
        mask_STN = torch.zeros(hidden_STN.shape, dtype=dtype, device=device).masked_fill_(hidden_STN, float("-inf"))
        # The queries of a key head: each token's group of heads.
        mask = mask_STN.repeat_interleave(self._shape.kv_heads, 0)
        if self._tokens > 1:
            mask = mask.repeat_interleave(self._shape.heads // self._shape.kv_heads, 1)
        index = torch.arange(pool.running, device=device).unsqueeze(1).expand_as(places_ST)
        return _Part(pool, index, places_ST, longest, mask)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, size = self._shape.kv_heads, self._shape.head_size
        for part, key, value in zip(self._parts, k.split(self._rows), v.split(self._rows), strict=True):
            keys, values = part.pool.kv[:, layer]
            keys[part.index, :, part.places] = key.reshape(-1, self._tokens, heads, size)
            values[part.index, :, part.places] = value.reshape(-1, self._tokens, heads, size)
        outputs = [self._attend(layer, part, rows) for part, rows in zip(self._parts, q.split(self._rows), strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, layer: int, part: _Part, q: Tensor) -> Tensor:
        heads, size, tokens, slots = self._shape.kv_heads, self._shape.head_size, self._tokens, part.pool.running
        keys, values = part.pool.kv[:, layer, :slots]
        grouped = q.reshape(slots, tokens, heads, -1, size).transpose(1, 2).reshape(slots * heads, -1, size)
        seen = part.longest
        out = _attend(grouped, keys.flatten(0, 1)[:, :seen], values.flatten(0, 1)[:, :seen], part.mask)
        return out.view(slots, heads, tokens, -1, size).transpose(1, 2).reshape(slots * tokens, -1)


@dataclass(frozen=True, slots=True)
class _Part:
    """A pool in a decoding step: S running slots with T new tokens each."""

    pool: _Pool
    index: Tensor
    """[S, T], the slot of each new token."""
    places: Tensor
    """[S, T], its place in the slot."""
    longest: int
    """Tokens of the longest slot, new ones included."""
    mask: Tensor
    """[S · kv_heads, 1 or T · heads / kv_heads, longest]."""


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention with few queries per key head: ``q`` [heads, queries, size], ``mask`` [heads, 1 or queries, tokens]."""
    if q.device.type != "cpu" or q.dtype != torch.float32:
        out = functional.scaled_dot_product_attention(
            q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), attn_mask=mask.unsqueeze(1)
        )
        return out.squeeze(1)
    # On a CPU, two batched products beat the fused kernel, which is tuned for blocks of queries.
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(torch.softmax(scores, dim=-1), v)
