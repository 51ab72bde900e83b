"""The sampler's interface to a model: prefill prompts, decode one token of running sequences, finish sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchr1_async.local.attention import TreeAttention
from searchr1_async.local.backend import InflightClient
from searchr1_async.local.kv_cache import DecodeCache, PrefixStore, Slot
from searchr1_async.local.lora import LoraWeights
from searchr1_async.local.packing import PackedPrefix, pack
from searchr1_async.local.transformer import LeanTransformer, LoraRows

Int32Array = NDArray[np.int32]
Owner = LoraWeights | InflightClient | None
"""A sequence's weights and prefix cache namespace; None is the base model."""


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
