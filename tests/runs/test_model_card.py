"""Model cards of weights without a run; test_export.py covers runs."""

from __future__ import annotations

import pytest

from searchr1_async.runs.adapters import model_card

FACTS = {"name": "adapter", "base_model": "Qwen/Qwen3.5-4B", "format": "peft", "rank": 32, "step": None}


def test_weights_of_no_run_say_what_they_are_and_how_to_load_them() -> None:
    card = model_card(FACTS, None, None)
    assert card.startswith("---\nbase_model: Qwen/Qwen3.5-4B\nlibrary_name: peft\n")
    assert (
        "A LoRA adapter (rank 32) for `Qwen/Qwen3.5-4B`, trained to answer questions with a search tool. Trained"
        in card
    )
    assert "merge_and_unload" in card
    assert [line for line in card.splitlines() if line.startswith("## ")] == ["## Loading"]


def test_merged_weights_need_no_base_model() -> None:
    card = model_card(FACTS | {"format": "merged", "step": 3}, None, None)
    assert "`Qwen/Qwen3.5-4B` with a LoRA adapter (rank 32) merged into it" in card
    assert "tool: 3 optimizer steps of reinforcement learning." in card
    assert "vllm serve adapter\n" in card
    assert "PeftModel" not in card


@pytest.mark.parametrize(("rank", "served"), [(4, 8), (16, 16), (48, 64), (257, 512)])
def test_vllm_is_given_a_rank_that_it_takes(rank: int, served: int) -> None:
    assert f"--max-lora-rank {served} " in model_card(FACTS | {"rank": rank}, None, None)
