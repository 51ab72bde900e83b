"""Decoding in float32 on a CPU: the forward pass with products by oneDNN and compiled :mod:`kernels` between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from searchr1_async.local import kernels
from searchr1_async.local.kv_cache import KvCache
from searchr1_async.local.lora import swiglu
from searchr1_async.local.transformer import LeanTransformer

PRODUCT_ROWS = 6
"""Rows of the smallest product: oneDNN's are faster with 5 or 6 rows than with 1."""
_MOST_ATTENDED_ALONE = 1000
"""Tokens attended to in all, up to which one thread is as fast as several: waking the others takes some 50 µs."""
_MOST_GATED = 16
"""Rows up to which the activation's kernel on one thread beats torch's on several."""


class Decoder:
    """The forward pass of :class:`LeanTransformer` for one new token, or a few, of every running sequence."""

    def __init__(self, model: LeanTransformer) -> None:
        self._model = model
        self.available = model.can_merge and all(layer.q_norm is None for layer in model.layers)
        """For models that do not norm queries and keys."""
        norms = [norm for layer in model.layers for norm in (layer.attention_norm, layer.mlp_norm)]
        self._helpers = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "attention")
        self._norms = [norm.float().cpu().numpy() for norm in (*norms, model.norm)]

    def logits(self, tokens: Sequence[int], positions: Sequence[int], cache: KvCache, count: int) -> Tensor:
        """Next-token logits [rows, vocabulary] of the weights that are packed.

        Rows are in the cache's ``batch_order``, each slot's ``count`` tokens together.
        """
        model, rows = self._model, len(tokens)
        shape, places = model.shape, cache.places(count)
        threads = torch.get_num_threads() if sum(positions) + rows > _MOST_ATTENDED_ALONE else 1
        size = max(rows, PRODUCT_ROWS)
        x, normed = torch.zeros(2, size, shape.hidden)
        attended, middle = torch.zeros(size, shape.heads * shape.head_size), torch.zeros(size, shape.middle)
        x[:rows] = model.embedding[torch.tensor(tokens)]
        cos, sin = (turn.squeeze(1).numpy() for turn in model.rotations(torch.tensor(positions)))
        norms = iter(self._norms)

        def add_and_norm(y: np.ndarray) -> None:
            kernels.add_and_norm(x.numpy(), y, next(norms), model.eps, normed.numpy(), rows)

        add_and_norm(np.zeros(x.shape, np.float32))
        for number, layer in enumerate(model.layers):
            qkv = layer.qkv.forward_packed(normed)
            first = 0
            for part in places:
                keys_values = part.keys[number], part.values[number]
                kernels.rotate_and_store(qkv.numpy(), (cos, sin), keys_values, part.slots, part.places, first)
                attend = partial(
                    kernels.attend, qkv.numpy(), keys_values, part.slots, part.places, attended.numpy(), first
                )
                self._in_shares(attend, threads)
                first += len(part.slots)
            add_and_norm(layer.output.forward_packed(attended).numpy())
            gate_up = layer.gate_up.forward_packed(normed)
            if rows > _MOST_GATED:
                middle = swiglu(gate_up)
            else:
                kernels.swiglu(gate_up.numpy(), middle.numpy(), rows)
            add_and_norm(layer.down.forward_packed(middle).numpy())
        return model.head.forward_packed(normed)[:rows]

    def _in_shares(self, kernel: Callable[[tuple[int, int]], None], threads: int) -> None:
        """Runs it on several threads. Not on torch's: a second pool of OpenMP threads would slow both down."""
        others = [self._helpers.submit(kernel, (i, threads)) for i in range(1, threads)]
        kernel((0, threads))
        for other in others:
            other.result()
