from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from searchr1_async.local.compat import has_onednn
from searchr1_async.local.packing import TreeAttention, pack
from searchr1_async.local.transformer import LeanTransformer, is_lean, read_safetensors
from searchr1_async.testing import make_tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"config_class": LlamaConfig},
    "llama untied, biased": {
        "config_class": LlamaConfig,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama 3 positions": {
        "config_class": LlamaConfig,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"config_class": MistralConfig, "sliding_window": None},
    "qwen 2": {"config_class": Qwen2Config},
    "qwen 3": {"config_class": Qwen3Config, "head_dim": 32},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, **VARIANTS[variant])
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        # Norms and biases start at one and zero, which would hide errors.
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    reference.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert is_lean(config)
    weights = read_safetensors(folder)
    assert weights is not None
    model = LeanTransformer(config, weights, onednn=has_onednn(torch.float32))
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(3, 400, (20,), generator=generator)
    sequences = [torch.cat([shared, torch.randint(3, 400, (length,), generator=generator)]) for length in (1, 30, 7)]

    packed = pack([sequence.numpy() for sequence in sequences])
    tokens, positions = torch.from_numpy(packed.tokens), torch.from_numpy(packed.positions)
    with torch.no_grad():
        hidden = model.hidden(tokens, positions, TreeAttention(packed, model.shape), [])
        logits = model.logits(hidden, [])
        assert len(logits) == 20 + 1 + 30 + 7
        for sequence, path in zip(sequences, packed.paths, strict=True):
            expected = reference(sequence.unsqueeze(0)).logits[0]
            torch.testing.assert_close(logits[torch.from_numpy(path.rows())], expected, atol=2e-4, rtol=1e-4)


def test_long_segments_are_attended_to_in_blocks(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, num_hidden_layers=1)
    weights = read_safetensors(folder)
    assert weights is not None
    model = LeanTransformer(AutoConfig.from_pretrained(folder), weights, onednn=False)
    sequence = torch.randint(3, 400, (1300,), generator=torch.Generator().manual_seed(0))

    packed = pack([sequence.numpy()])
    with torch.no_grad():
        attention = TreeAttention(packed, model.shape)
        hidden = model.hidden(sequence, torch.arange(1300), attention, [])
        expected = AutoModelForCausalLM.from_pretrained(folder)(sequence.unsqueeze(0)).logits[0]
        torch.testing.assert_close(model.logits(hidden, []), expected, atol=2e-4, rtol=1e-4)


def test_unsupported_configurations_are_not_lean(tmp_path: Path) -> None:
    assert not is_lean(MistralConfig(sliding_window=128))
    assert not is_lean(LlamaConfig(hidden_act="gelu"))
    assert not is_lean(LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    assert read_safetensors(tmp_path) is None
