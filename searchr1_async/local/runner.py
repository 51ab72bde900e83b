"""The sampler's interface to a model: prefill prompts, decode one token of running sequences, finish sequences.

Two KV caches serve it: the prefix cache of past sequences, and the decode cache of running ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from searchr1_async.local.backend import InflightClient, Int32Array, common_prefix_length
from searchr1_async.local.lora import LoraWeights
from searchr1_async.local.packing import PackedPrefix, TreeAttention, pack
from searchr1_async.local.transformer import LeanTransformer, LoraRows, Shape

Owner = LoraWeights | InflightClient | None
"""A sequence's weights and prefix cache namespace; None is the base model."""
_SMALLEST_CAPACITY = 128


def weights_of(owner: Owner) -> LoraWeights | None:
    """The current weights; an in-flight client's are those of the latest save."""
    if not isinstance(owner, InflightClient):
        return owner
    snapshot = owner.target.snapshot
    if not isinstance(snapshot, LoraWeights):
        raise TypeError(f"in-flight client without weights of this backend: {snapshot!r:.100}")
    return snapshot


@dataclass(frozen=True, slots=True)
class Prefilled:
    handles: tuple[Any, ...]
    """One per running copy, for :meth:`Runner.decode` and :meth:`Runner.finish`."""
    logits: Tensor
    """Next-token logits [vocabulary], float32."""
    cached_tokens: int
    """Prompt tokens from the cache."""
    prompt_logits: Callable[[int, int], Tensor] | None
    """Logits [stop - start, vocabulary] after prompt tokens start to stop, if requested."""


class Runner(Protocol):
    """A model with the KV cache of its running sequences."""

    def cached(self, owner: Owner, prompt: Int32Array) -> int:
        """Number of cached tokens of ``prompt``."""
        ...

    def prefill(
        self, owner: Owner, prompts: Sequence[Int32Array], copies: Sequence[int], all_logits: bool
    ) -> list[Prefilled]:
        """Prefill ``prompts`` together and open ``copies[i]`` running sequences of each."""
        ...

    def decode(self, handles: Sequence[Any], tokens: Sequence[int], owners: Sequence[Owner]) -> Tensor:
        """Append one token to every running sequence; returns next-token logits [len(handles), vocabulary]."""
        ...

    def finish(self, handle: Any, owner: Owner, tokens: Int32Array | None) -> None:
        """End a sequence and cache its state for ``tokens`` (None: discard its state)."""
        ...


@dataclass(eq=False, slots=True)
class _Node:
    """A radix tree edge: tokens and their keys and values [2, layers, tokens, kv_heads, size]."""

    tokens: Int32Array
    kv: Tensor | None
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    used: int = 0


class _Root:
    def __init__(self) -> None:
        self.top = _Node(np.empty(0, np.int32), None, None)
        self.tokens = 0


class PrefixStore:
    """Prefix cache: keys and values in one radix tree per snapshot, bounded in bytes, evicting LRU leaves.

    Keys and values depend on the adapter, so snapshots share nothing; a tree is freed with its snapshot.
    """

    def __init__(self, shape: Shape, capacity_bytes: int, dtype: torch.dtype) -> None:
        self.bytes_per_token = 2 * shape.layers * shape.kv_heads * shape.head_size * dtype.itemsize
        self.capacity = capacity_bytes // self.bytes_per_token
        self._base = _Root()
        self._roots: WeakKeyDictionary[Hashable, _Root] = WeakKeyDictionary()
        self._clock = itertools.count(1)

    @property
    def tokens(self) -> int:
        """Cached tokens over all snapshots."""
        return self._base.tokens + sum(root.tokens for root in self._roots.values())

    def lookup(self, owner: Hashable | None, tokens: Int32Array) -> tuple[int, list[Tensor]]:
        """Length of the longest cached prefix of ``tokens``, and its keys and values in pieces."""
        length, pieces = 0, []
        for node, matched in self._walk(self._root(owner), tokens):
            assert node.kv is not None
            pieces.append(node.kv[:, :, :matched])
            length += matched
        return length, pieces

    def match(self, owner: Hashable | None, tokens: Int32Array) -> int:
        """Length of the longest cached prefix of ``tokens``."""
        return sum(matched for _, matched in self._walk(self._root(owner), tokens))

    def insert(self, owner: Hashable | None, tokens: Int32Array, kv: Tensor) -> None:
        """Cache ``kv`` [2, layers, tokens, kv_heads, size], which may be a view; only its new part is copied."""
        if len(tokens) > self.capacity:
            return
        root = self._root(owner)
        node, done = root.top, 0
        for visited, matched in self._walk(root, tokens):
            node, done = visited, done + matched
            if matched < len(visited.tokens):
                self._split(visited, matched)
        if done == len(tokens):
            return
        rest = np.array(tokens[done:], dtype=np.int32)
        leaf = _Node(rest, kv[:, :, done:].clone(), node, used=next(self._clock))
        node.children[int(rest[0])] = leaf
        root.tokens += len(rest)
        if self.tokens > self.capacity:
            self._evict()

    def _root(self, owner: Hashable | None) -> _Root:
        if owner is None:
            return self._base
        root = self._roots.get(owner)
        if root is None:
            root = self._roots[owner] = _Root()
        return root

    def _walk(self, root: _Root, tokens: Int32Array) -> Iterator[tuple[_Node, int]]:
        node, done = root.top, 0
        while done < len(tokens):
            child = node.children.get(int(tokens[done]))
            if child is None:
                return
            matched = common_prefix_length(child.tokens, tokens[done:])
            child.used = next(self._clock)
            yield child, matched
            if matched < len(child.tokens):
                return
            node, done = child, done + matched

    @staticmethod
    def _split(node: _Node, length: int) -> None:
        """Split an edge: ``node`` keeps its first ``length`` tokens, a new child gets the rest."""
        assert node.kv is not None
        # Cloned: a view would keep the memory of the whole edge alive after the other half is evicted.
        rest = _Node(node.tokens[length:], node.kv[:, :, length:].clone(), node, node.children, node.used)
        for child in rest.children.values():
            child.parent = rest
        node.tokens, node.kv = node.tokens[:length], node.kv[:, :, :length].clone()
        node.children = {int(rest.tokens[0]): rest}

    def _evict(self) -> None:
        """Drop least recently used leaves until a tenth of the capacity is free."""
        goal = self.capacity - self.capacity // 10
        while self.tokens > goal:
            leaves = [
                (leaf.used, root, leaf)
                for root in (self._base, *self._roots.values())
                for leaf in _leaves(root.top)
                if leaf is not root.top
            ]
            leaves.sort(key=lambda entry: entry[0])
            for _, root, leaf in leaves:
                if self.tokens <= goal:
                    return
                assert leaf.parent is not None
                del leaf.parent.children[int(leaf.tokens[0])]
                root.tokens -= len(leaf.tokens)


def _leaves(top: _Node) -> Iterator[_Node]:
    stack = [top]
    while stack:
        node = stack.pop()
        if node.children:
            stack.extend(node.children.values())
        else:
            yield node


@dataclass(eq=False, slots=True)
class Slot:
    pool: _Pool
    index: int
    length: int = 0
    """Cached tokens."""


class _Pool:
    """Slots of one capacity in one tensor; used slots are contiguous at the front."""

    def __init__(self, shape: Shape, capacity: int, like: Tensor) -> None:
        self._shape = shape
        self.capacity = capacity
        self.slots: list[Slot] = []
        self.kv = like.new_empty(2, shape.layers, 0, shape.kv_heads, capacity, shape.head_size)

    def open(self) -> Slot:
        if len(self.slots) == self.kv.shape[2]:
            shape = list(self.kv.shape)
            shape[2] = max(4, 2 * shape[2])
            grown = self.kv.new_zeros(shape)
            grown[:, :, : len(self.slots)] = self.kv
            self.kv = grown
        slot = Slot(self, len(self.slots))
        self.slots.append(slot)
        return slot

    def close(self, slot: Slot) -> None:
        last = self.slots.pop()
        if last is not slot:
            self.kv[:, :, slot.index, :, : last.length] = self.kv[:, :, last.index, :, : last.length]
            last.index = slot.index
            self.slots[slot.index] = last
        if not self.slots:
            self.kv = self.kv[:, :, :0].clone()


class DecodeCache:
    """Keys and values of running sequences, in pools by capacity (128, 256, 512, … tokens).

    Each pool takes one attention call. A sequence that outgrows its pool moves to the next one, so a long sequence does
    not pad all the others.
    """

    def __init__(self, shape: Shape, like: Tensor) -> None:
        """``like`` gives dtype and device."""
        self._shape = shape
        self._like = like
        self._pools: dict[int, _Pool] = {}

    def open(self, length: int) -> Slot:
        """A slot with room for ``length`` + 1 tokens."""
        return self._pool_for(length + 1).open()

    def fill(self, slot: Slot, start: int, kv: Tensor) -> None:
        """Write ``kv`` [2, layers, tokens, kv_heads, size] from token ``start`` on."""
        stop = start + kv.shape[2]
        slot.pool.kv[:, :, slot.index, :, start:stop] = kv.transpose(2, 3)
        slot.length = max(slot.length, stop)

    def read(self, slot: Slot) -> Tensor:
        """A view [2, layers, tokens, kv_heads, size] of a slot's tokens."""
        return slot.pool.kv[:, :, slot.index, :, : slot.length].transpose(2, 3)

    def close(self, slot: Slot, *, wipe: bool = False) -> None:
        """``wipe`` zeroes the slot: masked values are multiplied by zero, which would still propagate NaN."""
        if wipe:
            slot.pool.kv[:, :, slot.index] = 0.0
        slot.pool.close(slot)

    def make_room(self, slots: Sequence[Slot]) -> None:
        """Move each full slot to a larger pool, in place."""
        for slot in slots:
            if slot.length < slot.pool.capacity:
                continue
            larger = self._pool_for(slot.length + 1).open()
            self.fill(larger, 0, self.read(slot))
            slot.pool.close(slot)
            larger.pool.slots[larger.index] = slot
            slot.pool, slot.index = larger.pool, larger.index

    def batch_order(self) -> list[Slot]:
        """All open slots, in :class:`DecodeAttention`'s row order."""
        return [slot for _, pool in sorted(self._pools.items()) for slot in pool.slots]

    def attention(self) -> DecodeAttention:
        return DecodeAttention([pool for _, pool in sorted(self._pools.items()) if pool.slots], self._shape)

    def _pool_for(self, tokens: int) -> _Pool:
        capacity = _SMALLEST_CAPACITY
        while capacity < tokens:
            capacity *= 2
        pool = self._pools.get(capacity)
        if pool is None:
            pool = self._pools[capacity] = _Pool(self._shape, capacity, self._like)
        return pool


class DecodeAttention:
    """Appends one token's key and value to every open slot and attends to the slot's tokens."""

    def __init__(self, pools: Sequence[_Pool], shape: Shape) -> None:
        self._pools = pools
        self._shape = shape
        self._rows = [len(pool.slots) for pool in pools]
        self._lengths, self._masks = [], []
        groups = shape.heads // shape.kv_heads
        for pool in pools:
            device, dtype = pool.kv.device, pool.kv.dtype
            lengths = torch.tensor([slot.length for slot in pool.slots], device=device)
            longest = int(lengths.max()) + 1
            hidden = torch.arange(longest, device=device).unsqueeze(0) > lengths.unsqueeze(1)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            self._lengths.append(lengths)
            self._masks.append(mask[:, None, None, :].expand(-1, 1, groups, -1))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = self._shape
        outputs = []
        parts = zip(self._pools, self._lengths, self._masks, q.split(self._rows), k.split(self._rows),
                    v.split(self._rows), strict=True)  # fmt: skip
        for pool, lengths, mask, queries, key, value in parts:
            rows, longest = len(queries), mask.shape[-1]
            index = torch.arange(rows, device=queries.device)
            keys, values = pool.kv[0, layer, :rows], pool.kv[1, layer, :rows]
            keys[index, :, lengths] = key
            values[index, :, lengths] = value
            grouped = queries.reshape(rows, shape.kv_heads, -1, shape.head_size)
            out = _attend(grouped, keys[:, :, :longest], values[:, :, :longest], mask)
            outputs.append(out.reshape(rows, -1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def advance(self) -> None:
        """Add the new tokens to the slots' lengths, after the last layer."""
        for pool in self._pools:
            for slot in pool.slots:
                slot.length += 1


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention with few queries per key head: ``q`` [rows, kv_heads, groups, size]."""
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # On CPU, two batched products beat the fused kernel, which is tuned for blocks of queries.
    scores = torch.matmul(q * (q.shape[-1] ** -0.5), k.transpose(2, 3)).add_(mask)
    return torch.matmul(torch.softmax(scores, dim=-1), v)


class LeanRunner:
    """:class:`Runner` over :class:`LeanTransformer`, with batched prefill, pooled caches and a prefix cache."""

    def __init__(self, model: LeanTransformer, cache_bytes: int) -> None:
        self._model = model
        self._cache = DecodeCache(model.shape, model.embedding)
        self._store = PrefixStore(model.shape, cache_bytes, model.embedding.dtype)

    def cached(self, owner: Owner, prompt: Int32Array) -> int:
        # The last token always runs: its logits are needed.
        return min(self._store.match(owner, prompt), len(prompt) - 1)

    @torch.no_grad()
    def prefill(
        self, owner: Owner, prompts: Sequence[Int32Array], copies: Sequence[int], all_logits: bool
    ) -> list[Prefilled]:
        known = [0 if all_logits else self.cached(owner, prompt) for prompt in prompts]
        packed = pack(prompts, known)
        past = {
            index: torch.cat(self._store.lookup(owner, prompts[index][: known[index]])[1], dim=2)
            for index in {path.past for path in packed.paths if path.past is not None}
        }
        attention = TreeAttention(packed, self._model.shape, past=past, keep=True)
        device = self._model.device
        lora = _lora_rows([owner])
        hidden = self._model.hidden(
            torch.from_numpy(packed.tokens).to(device), torch.from_numpy(packed.positions).to(device), attention, lora
        )
        assert attention.kept is not None
        kv = torch.stack([torch.stack([layer[which] for layer in attention.kept]) for which in (0, 1)])
        rows = [path.rows() for path in packed.paths]
        logits = self._model.logits(hidden[torch.tensor([int(row[-1]) for row in rows], device=device)], lora)
        results = []
        for index, (prompt, path) in enumerate(zip(prompts, packed.paths, strict=True)):
            handles = tuple(self._open(prompt, path, past, kv) for _ in range(copies[index]))
            if handles:
                self._store.insert(owner, prompt, self._cache.read(handles[0]))
            states = hidden[torch.from_numpy(rows[index]).to(device)] if all_logits else None
            results.append(Prefilled(handles, logits[index], known[index], self._prompt_logits(states, lora)))
        return results

    def _open(self, prompt: Int32Array, path: PackedPrefix, past: dict[int, Tensor], kv: Tensor) -> Slot:
        slot = self._cache.open(len(prompt))
        if path.past is not None:
            self._cache.fill(slot, 0, past[path.past][:, :, : path.past_length])
        done = path.past_length
        for start, stop in path.ranges:
            self._cache.fill(slot, done, kv[:, :, start:stop])
            done += stop - start
        return slot

    def _prompt_logits(self, states: Tensor | None, lora: Sequence[LoraRows]) -> Callable[[int, int], Tensor] | None:
        if states is None:
            return None
        return lambda start, stop: self._model.logits(states[start:stop], lora)

    @torch.no_grad()
    def decode(self, handles: Sequence[Slot], tokens: Sequence[int], owners: Sequence[Owner]) -> Tensor:
        self._cache.make_room(handles)
        row_of = {slot: row for row, slot in enumerate(self._cache.batch_order())}
        order = sorted(range(len(handles)), key=lambda i: row_of[handles[i]])
        device = self._model.device
        attention = self._cache.attention()
        lora = _lora_rows([owners[i] for i in order], device)
        hidden = self._model.hidden(
            torch.tensor([tokens[i] for i in order], device=device),
            torch.tensor([handles[i].length for i in order], device=device),
            attention,
            lora,
        )
        attention.advance()
        logits = self._model.logits(hidden, lora)
        if order == list(range(len(handles))):
            return logits
        return logits[torch.tensor([row_of[slot] for slot in handles], device=device)]

    def finish(self, handle: Slot, owner: Owner, tokens: Int32Array | None) -> None:
        if tokens is not None:
            self._store.insert(owner, tokens[: handle.length], self._cache.read(handle)[:, :, : len(tokens)])
        self._cache.close(handle, wipe=tokens is None)


def _lora_rows(owners: Sequence[Owner], device: torch.device | None = None) -> list[LoraRows]:
    """Rows per adapter; base model rows are omitted."""
    groups: dict[LoraWeights, list[int]] = {}
    for row, owner in enumerate(owners):
        weights = weights_of(owner)
        if weights is not None:
            groups.setdefault(weights, []).append(row)
    return [
        LoraRows(weights, None if len(rows) == len(owners) else torch.tensor(rows, device=device))
        for weights, rows in groups.items()
    ]
