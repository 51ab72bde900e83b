from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from searchr1_async.local.compat import has_onednn
from searchr1_async.local.transformer import (
    LeanTransformer,
    TreeAttention,
    is_lean,
    micro_batches,
    pack,
    read_safetensors,
)
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
    model = LeanTransformer(config, weights, packed=has_onednn())
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
    model = LeanTransformer(AutoConfig.from_pretrained(folder), weights, packed=False)
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


# A small alphabet makes shared prefixes frequent.
sequences_of_tokens = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(lambda ids: np.array(ids, np.int32)),
    min_size=1,
    max_size=8,
)


def _distinct_prefixes(sequences: list[np.ndarray]) -> set[tuple[int, ...]]:
    return {tuple(s[: i + 1].tolist()) for s in sequences for i in range(len(s))}


@given(sequences_of_tokens)
def test_every_distinct_prefix_has_one_row_and_every_sequence_finds_its_own(sequences: list[np.ndarray]) -> None:
    packed = pack(sequences)

    assert len(packed.tokens) == len(_distinct_prefixes(sequences))
    for sequence, path in zip(sequences, packed.paths, strict=True):
        rows = path.rows()
        assert packed.tokens[rows].tolist() == sequence.tolist()
        assert packed.positions[rows].tolist() == list(range(len(sequence)))


@given(sequences_of_tokens)
def test_a_segment_sees_exactly_the_tokens_before_it(sequences: list[np.ndarray]) -> None:
    packed = pack(sequences)
    prefixes = _distinct_prefixes(sequences)

    for segment in packed.segments:
        ranges = (*segment.context, (segment.start, segment.stop))
        whole = tuple(token for start, stop in ranges for token in packed.tokens[start:stop].tolist())
        assert whole in prefixes
        assert packed.positions[segment.start] == len(whole) - (segment.stop - segment.start)
    assert [s.start for s in packed.segments] == [0, *(s.stop for s in packed.segments[:-1])]


@given(sequences_of_tokens, st.data())
def test_cached_tokens_get_no_row(sequences: list[np.ndarray], data: st.DataObject) -> None:
    known = [data.draw(st.integers(0, len(sequence) - 1)) for sequence in sequences]

    packed = pack(sequences, known)

    for sequence, path in zip(sequences, packed.paths, strict=True):
        cached = sequences[path.past][: path.past_length].tolist() if path.past is not None else []
        assert cached + packed.tokens[path.rows()].tolist() == sequence.tolist()
        assert len(path.rows()) >= 1, "the last token is always computed: its logits are needed"


@given(sequences_of_tokens, st.integers(1, 20))
def test_micro_batches_hold_every_sequence_once_within_the_bound(sequences: list[np.ndarray], bound: int) -> None:
    batches = micro_batches(sequences, bound)

    assert sorted(index for batch in batches for index in batch) == list(range(len(sequences)))
    for batch in batches:
        rows = len(pack([sequences[i] for i in batch]).tokens)
        assert rows <= bound or len(batch) == 1 or rows == max(len(sequences[i]) for i in batch)


def test_members_of_a_group_stay_together() -> None:
    groups = [np.array([first, *range(10), member], np.int32) for member in (50, 51) for first in (7, 3)]

    batches = micro_batches(groups, 13)

    assert [sorted(batch) for batch in batches] == [[1, 3], [0, 2]]
