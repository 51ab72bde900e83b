"""Decoding of few rows on a CPU, as in the tail of a batch: the forward pass with products by oneDNN and :mod:`kernels` between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from searchr1_async.local import kernels
from searchr1_async.local.kv_cache import Places
from searchr1_async.local.transformer import LeanTransformer

MOST_ROWS = 8
"""More rows are as fast in torch."""
PRODUCT_ROWS = 6
"""Rows of the smallest product: oneDNN's are faster with 5 or 6 rows than with 1."""


class FewRows:
    """The forward pass of :class:`LeanTransformer` for one new token, or a few, of every running sequence."""

    def __init__(self, model: LeanTransformer) -> None:
        self._model = model
        self.available = model.can_merge and all(layer.q_norm is None for layer in model.layers)
        """In float32 on a CPU, for models that do not norm queries and keys."""
        self._norms = [
            norm.float().cpu().numpy() for layer in model.layers for norm in (layer.attention_norm, layer.mlp_norm)
        ] + [model.norm.float().cpu().numpy()]

    def logits(self, tokens: Sequence[int], positions: Sequence[int], places: Sequence[Places]) -> Tensor:
        """Next-token logits [rows, vocabulary] of the weights that are packed; rows in the order of ``places``."""
        model, rows = self._model, len(tokens)
        shape = model.shape
        size = max(rows, PRODUCT_ROWS)
        x, normed = torch.zeros(2, size, shape.hidden)
        attended, middle = torch.zeros(size, shape.heads * shape.head_size), torch.zeros(size, shape.middle)
        x[:rows] = model.embedding[torch.tensor(tokens)]
        cos, sin = (turn.squeeze(1).numpy() for turn in model.rotations(torch.tensor(positions)))
        norms = iter(self._norms)
        nothing = np.zeros(x.shape, np.float32)

        def add_and_norm(y: np.ndarray) -> None:
            kernels.add_and_norm(x.numpy(), y, next(norms), model.eps, normed.numpy(), rows)

        add_and_norm(nothing)
        for number, layer in enumerate(model.layers):
            qkv = layer.qkv.forward_packed(normed).numpy()
            first = 0
            for part in places:
                keys_values = part.keys[number], part.values[number]
                kernels.attend(qkv, (cos, sin), keys_values, part.slots, part.places, attended.numpy(), first)
                first += len(part.slots)
            add_and_norm(layer.output.forward_packed(attended).numpy())
            kernels.swiglu(layer.gate_up.forward_packed(normed).numpy(), middle.numpy(), rows)
            add_and_norm(layer.down.forward_packed(middle).numpy())
        return model.head.forward_packed(normed)[:rows]
