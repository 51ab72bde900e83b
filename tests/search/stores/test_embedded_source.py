"""A corpus that is embedded on the way: in order, several requests at once, and nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from searchr1_async.data.corpus import load_corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import EmbeddingError, StoreError
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
    monkeypatch.setattr(embedded, "WINDOW", 8)
    monkeypatch.setattr(passage_embedding, "PASSAGES_A_REQUEST", 4)
    monkeypatch.setattr(passage_embedding, "PASSAGES_AT_ONCE", 4)


def source_of(embedder: Any, folder: Path, **options: Any) -> EmbeddedCorpus:
    return EmbeddedCorpus(load_corpus(MANY), embedder, folder / "journal", BuildOptions(**options))


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
async def test_the_rows_come_in_order_from_any_on(embedder: Any, tmp_path: Path, start: int) -> None:
    source = source_of(embedder, tmp_path)
    facts = await source.open()
    assert (facts.count, facts.dimension, facts.metric) == (TOTAL, embedder.dimension, "cosine")
    assert facts.embedder_fingerprint == embedder.fingerprint
    blocks = [block async for block in source.blocks(start)]
    assert [passage for own, _ in blocks for passage in own] == MANY[start:]
    assert all(0 < len(own) == len(vectors) <= 8 for own, vectors in blocks)
    if blocks:
        expected = embedder.embed([passage_text(passage) for passage in MANY[start:]])
        np.testing.assert_array_equal(np.concatenate([vectors for _, vectors in blocks]), expected)
    assert sum(asked(embedder).values()) == TOTAL - start
    await source.kept(TOTAL)
    assert not (tmp_path / "journal").exists()
    await source.aclose()
    assert not embedder.is_open


@pytest.mark.parametrize("how", ["a failure", "a cancellation", "an end"])
async def test_what_was_answered_is_not_embedded_again(
    make_embedder: Callable[..., Any], tmp_path: Path, how: str
) -> None:
    first, second = make_embedder(), make_embedder()
    source = source_of(first, tmp_path)
    await source.open()
    done = 0
    with anyio.CancelScope() as scope:
        try:
            async for own, _ in source.blocks(0):
                done += len(own)
                if done >= 24:
                    await source.kept(20)  # two windows and a half
                    if how == "an end":
                        break
                    if how == "a cancellation":
                        scope.cancel()
                    first.failure = EmbeddingError("the quota is used up")
        except EmbeddingError:
            assert how == "a failure"
    await source.aclose()
    kept = {int(file.stem) for file in (tmp_path / "journal").iterdir()}
    assert min(kept) == 2
    again = source_of(second, tmp_path)
    await again.open()
    passages, vectors = await read(again, 20)
    assert passages == MANY[20:]
    np.testing.assert_array_equal(vectors, second.embed([passage_text(passage) for passage in MANY[20:]]))
    assert set(asked(first, second).values()) == {1}
    assert sum(asked(first, second).values()) == TOTAL
    await again.kept(TOTAL)
    await again.aclose()


async def test_a_loop_that_is_left_leaves_no_task_behind(embedder: Any, tmp_path: Path) -> None:
    import asyncio

    before = asyncio.all_tasks()
    source = source_of(embedder, tmp_path)
    await source.open()
    iterator = source.blocks(0)
    await anext(iterator)
    assert asyncio.all_tasks() > before
    await source.aclose()
    assert asyncio.all_tasks() == before
    await iterator.aclose()


async def test_the_cost_is_said_before_the_first_request(embedder: Any, tmp_path: Path) -> None:
    embedder.name = "gemini-embedding-001"
    told: list[Event] = []
    source = source_of(embedder, tmp_path, emit=lambda event: told.append(event) or embedder.passage_batches.clear())
    await source.open()
    await read(source, 3)
    (notice,) = told
    assert isinstance(notice, Notice)
    assert "embedding 83 passages" in notice.text
    assert "$" in notice.text
    assert "minus the 3 already in the index" in notice.text
    assert sum(asked(embedder).values()) == TOTAL - 3  # none before it was said
    await source.aclose()


async def test_equal_content_has_equal_fingerprints(make_embedder: Callable[..., Any], tmp_path: Path) -> None:
    async def fingerprint(embedder: Any) -> str:
        source = source_of(embedder, tmp_path)
        try:
            return (await source.open()).fingerprint
        finally:
            await source.aclose()

    assert await fingerprint(make_embedder()) == await fingerprint(make_embedder())
    assert await fingerprint(make_embedder()) != await fingerprint(make_embedder(dimension=64))


async def test_it_is_open_before_it_is_read(embedder: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not open"):
        await read(source_of(embedder, tmp_path))
