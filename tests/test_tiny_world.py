"""Assumptions of the whole-run tests about their small world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from searchr1_async.testing import HashingEmbedder
from tests import tiny_world

pytestmark = pytest.mark.anyio


async def test_no_two_passages_tie() -> None:
    """Whatever a baseline or half-trained model searches for: a question, its two words, or one of them."""
    facts = tiny_world.make_facts()
    queries = [f"{relation} of {place}?" for relation, place in facts]
    queries += [f"{relation} {place}" for relation, place in facts]
    queries += [*tiny_world.RELATIONS, *tiny_world.PLACES, *tiny_world.THINGS]
    embedder = HashingEmbedder()
    found_QD = await embedder.embed_queries(queries)
    passages_PD = await embedder.embed_passages(
        [f"{relation} {place} {thing}" for (relation, place), thing in facts.items()]
    )
    nearest_QP = np.sort(found_QD.astype(np.float64) @ passages_PD.astype(np.float64).T)[:, ::-1]
    # Only the first is shown. Sums of 512 float32 products differ by about 1e-7, depending on the order.
    assert (nearest_QP[:, 0] - nearest_QP[:, 1]).min() > 2e-6


async def test_reopening_an_index_gives_the_same_results(tmp_path: Path) -> None:
    train, _ = tiny_world.make_questions()
    questions = tuple(question.question for question in train)
    found: list[list[str]] = []
    for _ in range(3):
        async with tiny_world.make_search(tmp_path / "index") as search:
            found.append([passages[0].id for passages in await search.search(questions)])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 4, "of every relation several"
