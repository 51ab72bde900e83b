"""A corpus that is embedded on the way: in order, several requests at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from searchr1_async.data.corpus import load_corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.events import Event, Notice
from searchr1_async.search import passage_embedding
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.passage_embedding import BuildOptions, passage_text
from searchr1_async.search.stores import sources as embedded
from searchr1_async.search.stores.sources import EmbeddedCorpus

pytestmark = pytest.mark.anyio

TOTAL = 83
MANY = [Passage(f"p{number}", "Title", f"word{number} is number {number}") for number in range(TOTAL)]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (embedded, passage_embedding):
        monkeypatch.setattr(module, "WINDOW", 8)
    monkeypatch.setattr(passage_embedding, "PASSAGES_A_REQUEST", 4)
    monkeypatch.setattr(passage_embedding, "PASSAGES_AT_ONCE", 4)


def source_of(embedder: Any, **options: Any) -> EmbeddedCorpus:
    return EmbeddedCorpus(load_corpus(MANY), embedder, BuildOptions(**options))


async def read(source: EmbeddedCorpus, start: int = 0, most: int = TOTAL) -> tuple[list[Passage], Vectors]:
    passages: list[Passage] = []
    vectors: list[Vectors] = []
    async for own, block in source.blocks(start):
        passages += own
        vectors.append(block)
        if len(passages) >= most:
            break
    return passages, np.concatenate(vectors)


def asked(*embedders: Any) -> Counter[str]:
    return Counter(text for embedder in embedders for batch in embedder.passage_batches for text in batch)


@pytest.mark.parametrize("start", [0, 5, 8, 81, TOTAL])
async def test_the_rows_come_in_order_from_any_on(embedder: Any, start: int) -> None:
    source = source_of(embedder)
    facts = await source.open()
    assert (facts.count, facts.dimension, facts.metric) == (TOTAL, embedder.dimension, "cosine")
    blocks = [block async for block in source.blocks(start)]
    assert [passage for own, _ in blocks for passage in own] == MANY[start:]
    assert all(0 < len(own) == len(vectors) <= 8 for own, vectors in blocks)
    if blocks:
        expected = embedder.embed([passage_text(passage) for passage in MANY[start:]])
        np.testing.assert_array_equal(np.concatenate([vectors for _, vectors in blocks]), expected)
    assert sum(asked(embedder).values()) == TOTAL - start
    await source.aclose()
    assert not embedder.is_open


async def test_a_loop_that_is_left_leaves_no_task_behind(embedder: Any) -> None:
    import asyncio

    before = asyncio.all_tasks()
    source = source_of(embedder)
    await source.open()
    iterator = source.blocks(0)
    await anext(iterator)
    assert asyncio.all_tasks() > before
    await iterator.aclose()
    assert asyncio.all_tasks() == before
    await source.aclose()


async def test_the_cost_is_said_before_the_first_request(embedder: Any) -> None:
    embedder.name = "gemini-embedding-001"
    told: list[Event] = []
    source = source_of(embedder, emit=lambda event: told.append(event) or embedder.passage_batches.clear())
    await source.open()
    await read(source, 3)
    (notice,) = told
    assert isinstance(notice, Notice)
    assert "embedding 83 passages" in notice.text
    assert "$" in notice.text
    assert "minus the 3 already in the index" in notice.text
    assert sum(asked(embedder).values()) == TOTAL - 3  # none before it was said
    await source.aclose()


async def test_equal_content_has_equal_fingerprints(make_embedder: Callable[..., Any]) -> None:
    async def fingerprint(embedder: Any) -> str:
        source = source_of(embedder)
        try:
            return (await source.open()).fingerprint
        finally:
            await source.aclose()

    assert await fingerprint(make_embedder()) == await fingerprint(make_embedder())
    assert await fingerprint(make_embedder()) != await fingerprint(make_embedder(dimension=64))
