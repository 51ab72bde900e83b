"""The forward pass of decoding on a CPU beside the transformer's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen2Config, Qwen3Config

from searchr1_async.local import decoder
from searchr1_async.local.compat import has_onednn
from searchr1_async.local.decoder import Decoder
from searchr1_async.local.kv_cache import KvCache
from searchr1_async.local.packing import TreeAttention, pack
from searchr1_async.local.transformer import LeanTransformer, read_safetensors
from searchr1_async.testing import make_tiny_model

pytestmark = pytest.mark.skipif(not has_onednn(torch.float32), reason="oneDNN's linear is not in this build of torch")


def model_of(folder: Path, **config: Any) -> LeanTransformer:
    folder = make_tiny_model(folder, num_hidden_layers=3, **config)
    weights = read_safetensors(folder)
    assert weights is not None
    # Norms and biases start at one and zero, which would hide errors.
    for name, weight in weights.items():
        if weight.ndim == 1:
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3
    model = LeanTransformer(AutoConfig.from_pretrained(folder), weights, onednn=True)
    model.pack(None)
    return model


@pytest.mark.parametrize("config", [{}, {"config_class": Qwen2Config}], ids=["llama", "biased"])
@pytest.mark.parametrize("sequences", [1, 3, 20])
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_logits_are_those_of_the_whole_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], sequences: int, threads: int
) -> None:
    """Sequences of unlike lengths in two pools, two tokens at once."""
    monkeypatch.setattr(decoder, "_MOST_ATTENDED_ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model, random = model_of(tmp_path, **config), np.random.default_rng(0)
    whole = [random.integers(3, 400, 20 + 17 * number % 150).astype(np.int32) for number in range(sequences)]
    cache, count = KvCache(model.shape, model.embedding, 1 << 30), 2
    packed = pack(whole)
    kv = cache.empty(len(packed.tokens))
    attention = TreeAttention(packed, model.shape, keep=kv)
    hidden = model.hidden(torch.from_numpy(packed.tokens), torch.from_numpy(packed.positions), attention, [])
    expected = model.logits(hidden, [])
    rows_of = {}
    for tokens, path in zip(whole, packed.paths, strict=True):
        rows = torch.from_numpy(path.rows())
        slot = cache.open(None, tokens)
        cache.fill(slot, 0, kv[:, :, rows[:-count]])
        rows_of[slot] = rows[-count:]

    order = cache.batch_order()
    tokens = [int(token) for slot in order for token in slot.tokens[-count:]]
    positions = [slot.length + place for slot in order for place in range(count)]
    logits = Decoder(model).logits(tokens, positions, cache, count)

    torch.testing.assert_close(logits, expected[torch.cat([rows_of[slot] for slot in order])], atol=2e-4, rtol=1e-4)


def test_a_model_that_norms_its_queries_is_left_to_torch(tmp_path: Path) -> None:
    assert not Decoder(model_of(tmp_path, config_class=Qwen3Config, head_dim=32)).available
