"""The sampler's interface to a model: prefill prompts, decode one token of running sequences, finish sequences.

A lean model's keys and values stand in one cache, :mod:`~searchr1_async.local.kv_cache`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from searchr1_async.local.backend import InflightClient, Int32Array
from searchr1_async.local.decoder import PRODUCT_ROWS, Decoder
from searchr1_async.local.kv_cache import KvCache, Slot
from searchr1_async.local.lora import LoraWeights
from searchr1_async.local.machine import MemoryPlan
from searchr1_async.local.packing import PackedPrefix, TreeAttention, pack
from searchr1_async.local.transformer import LeanTransformer, LoraRows

Owner = LoraWeights | InflightClient | None
"""A sequence's weights and prefix cache namespace; None is the base model."""
_STEPS_BEFORE_PACKING = 8


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

    @property
    def capacity(self) -> int | None:
        """Tokens that running sequences may have in all; None: no limit."""
        ...

    def shrink(self) -> None:
        """Drops what is cached of sequences that have ended."""
        ...

    def give_back(self) -> None:
        """Returns memory that it does not use to the system."""
        ...

    def cached(self, owner: Owner, prompt: Int32Array) -> int:
        """Number of cached tokens of ``prompt``."""
        ...

    def prefill(
        self, owner: Owner, prompts: Sequence[Int32Array], copies: Sequence[int], all_logits: bool
    ) -> list[Prefilled]:
        """Prefill ``prompts`` together and open ``copies[i]`` running sequences of each."""
        ...

    free_rows: int
    """A step of so many rows takes no longer than one of a single row."""

    def decode(self, handles: Sequence[Any], tokens: Sequence[Sequence[int]], owners: Sequence[Owner]) -> Tensor:
        """Runs as many tokens of every running sequence; returns the logits after each, [sequences · tokens, vocabulary].

        Of several tokens all but the first are guesses: :meth:`accept` says how many were right.
        """
        ...

    def accept(self, handle: Any, tokens: int) -> None:
        """Keeps this many of the tokens that were decoded last."""
        ...

    def finish(self, handle: Any, owner: Owner, tokens: Int32Array | None) -> None:
        """End a sequence and cache its state for ``tokens`` (None: discard its state)."""
        ...


class LeanRunner:
    """:class:`Runner` over :class:`LeanTransformer`, with batched prefill and one cache for running and ended sequences."""

    def __init__(self, model: LeanTransformer, memory: MemoryPlan) -> None:
        self._model = model
        self._cache = KvCache(model.shape, model.embedding, memory.ended)
        self.capacity = memory.running // self._cache.bytes_per_token
        self._decoder = Decoder(model)
        self.free_rows = PRODUCT_ROWS if self._decoder.available else 1
        self._sampled: Callable[[], LoraWeights | None] = lambda: None
        """Refers to the adapter of the last step, weakly: its slots are dropped once it is gone."""
        self._steps_alone = 0

    def shrink(self) -> None:
        self._cache.shrink()

    def give_back(self) -> None:
        self._cache.give_back()

    def cached(self, owner: Owner, prompt: Int32Array) -> int:
        # The last token always runs: its logits are needed.
        return min(self._cache.find(owner, prompt)[1], len(prompt) - 1)

    @torch.no_grad()
    def prefill(
        self, owner: Owner, prompts: Sequence[Int32Array], copies: Sequence[int], all_logits: bool
    ) -> list[Prefilled]:
        found = [(None, 0) if all_logits else self._cache.find(owner, prompt) for prompt in prompts]
        known = [min(shared, len(prompt) - 1) for (_, shared), prompt in zip(found, prompts, strict=True)]
        packed = pack(prompts, known)
        pasts = {path.past for path in packed.paths if path.past is not None}
        sources = {index: slot for index, (slot, _) in enumerate(found) if index in pasts and slot is not None}
        past = {index: self._cache.read(slot) for index, slot in sources.items()}
        kv = self._cache.empty(len(packed.tokens))
        attention = TreeAttention(packed, self._model.shape, past=past, keep=kv)
        device = self._model.device
        lora = _lora_rows([owner])
        hidden = self._model.hidden(
            torch.from_numpy(packed.tokens).to(device), torch.from_numpy(packed.positions).to(device), attention, lora
        )
        rows = [path.rows() for path in packed.paths]
        logits = self._model.logits(hidden[torch.tensor([int(row[-1]) for row in rows], device=device)], lora)
        results, opened = [], []
        try:
            for index, (prompt, path) in enumerate(zip(prompts, packed.paths, strict=True)):
                handles = tuple(self._open(owner, prompt, path, sources, kv, opened) for _ in range(copies[index]))
                states = hidden[torch.from_numpy(rows[index]).to(device)] if all_logits else None
                results.append(Prefilled(handles, logits[index], known[index], self._prompt_logits(states, lora)))
        except BaseException:
            # Out of memory, for one. A slot that nobody owns would take part in every later step.
            for slot in opened:
                self._cache.drop(slot)
            raise
        return results

    def _open(
        self,
        owner: Owner,
        prompt: Int32Array,
        path: PackedPrefix,
        sources: Mapping[int, Slot],
        kv: Tensor,
        opened: list[Slot],
    ) -> Slot:
        """A running slot for a prompt: the slot that it continues, or a new one. It is added to ``opened`` first of all."""
        source = None if path.past is None else sources[path.past]
        if source is not None and not source.running and source.length == path.past_length:
            self._cache.resume(source, prompt)
            slot, source = source, None
        else:
            slot = self._cache.open(owner, prompt, keep=set(sources.values()))
        opened.append(slot)
        if source is not None:
            self._cache.fill(slot, 0, self._cache.read(source)[:, :, : path.past_length])
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
    def decode(self, handles: Sequence[Slot], tokens: Sequence[Sequence[int]], owners: Sequence[Owner]) -> Tensor:
        count = len(tokens[0])
        self._pack_for(owners)
        self._cache.make_room(handles, count)
        row_of = {slot: row for row, slot in enumerate(self._cache.batch_order())}
        order = sorted(range(len(handles)), key=lambda i: row_of[handles[i]])
        device = self._model.device
        run = [token for i in order for token in tokens[i]]
        positions = [handles[i].length + place for i in order for place in range(count)]
        weights = {weights_of(owner) for owner in owners}
        if self._decoder.available and len(weights) == 1 and self._model.is_packed(weights.pop()):
            logits = self._decoder.logits(run, positions, self._cache, count)
        else:
            lora = _lora_rows([owners[i] for i in order for _ in range(count)], device)
            attention = self._cache.attention(count)
            tokens_R, positions_R = torch.tensor(run, device=device), torch.tensor(positions, device=device)
            logits = self._model.logits(self._model.hidden(tokens_R, positions_R, attention, lora), lora)
        if order == list(range(len(handles))):
            return logits
        rows = [row_of[slot] * count + place for slot in handles for place in range(count)]
        return logits[torch.tensor(rows, device=device)]

    def accept(self, handle: Slot, tokens: int) -> None:
        handle.length += tokens

    def finish(self, handle: Slot, owner: Owner, tokens: Int32Array | None) -> None:
        if tokens is None:
            self._cache.drop(handle)
        else:
            self._cache.park(handle, tokens)

    def _pack_for(self, owners: Sequence[Owner]) -> None:
        """Packs the base model at first, and an adapter once it alone was sampled for a while: packing takes as long as a few steps."""
        if not self._model.can_pack:
            return
        weights = {weights_of(owner) for owner in owners}
        alone = weights.pop() if len(weights) == 1 and self._model.can_merge else None
        self._steps_alone = self._steps_alone + 1 if alone is self._sampled() else 1
        self._sampled = weakref.ref(alone) if alone is not None else lambda: None
        first = not self._model.has_packed
        if not self._model.is_packed(alone) and (first or self._steps_alone >= _STEPS_BEFORE_PACKING):
            self._model.pack(alone)


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
