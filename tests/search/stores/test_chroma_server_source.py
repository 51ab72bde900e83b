"""A collection of a real server, read a page at a time."""

from __future__ import annotations

import numpy as np
import pytest

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.stores import sources as chroma_server
from searchr1_async.search.stores.chroma_server import RemoteChroma
from searchr1_async.search.stores.sources import ChromaServer

pytestmark = pytest.mark.anyio

TOTAL = 57
MANY = [Passage(f"p{number}", f"Title {number}", f"text {number}") for number in range(TOTAL)]
VECTORS = np.random.default_rng(1).standard_normal((TOTAL, 6), dtype=np.float32)


async def test_the_rows_come_in_order_from_any_on(chroma_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteChroma("127.0.0.1", chroma_port, "source", create=True)
    await store.open()
    await store.add(MANY, VECTORS)
    source = ChromaServer("127.0.0.1", chroma_port, "source")
    monkeypatch.setattr(chroma_server, "PAGE", 10)
    monkeypatch.setattr(chroma_server, "LISTED", 25)
    facts = await source.open()
    assert (facts.count, facts.dimension, facts.metric) == (TOTAL, 6, "cosine")
    for start in (0, 9, 25, 31, 56, TOTAL):
        blocks = [block async for block in source.blocks(start)]
        assert [passage for own, _ in blocks for passage in own] == MANY[start:]
        assert all(0 < len(own) == len(vectors) <= 10 for own, vectors in blocks)
        if blocks:
            np.testing.assert_allclose(np.concatenate([vectors for _, vectors in blocks]), VECTORS[start:], atol=1e-6)
    await store.add([Passage("late", "", "text")], VECTORS[:1])
    await source.aclose()
    assert (await source.open()).fingerprint != facts.fingerprint
    await source.aclose()
    await store.aclose()


async def test_a_collection_that_is_missing_or_empty_is_said_so(chroma_port: int) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        await ChromaServer("127.0.0.1", chroma_port, "no-such-source").open()
    store = RemoteChroma("127.0.0.1", chroma_port, "empty-source", create=True)
    await store.open()
    await store.aclose()
    source = ChromaServer("127.0.0.1", chroma_port, "empty-source")
    with pytest.raises(StoreError, match="no passages"):
        await source.open()
    await source.aclose()


async def test_a_request_that_is_refused_ends_it_as_an_error_of_the_store(
    chroma_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RemoteChroma("127.0.0.1", chroma_port, "refused-source", create=True)
    await store.open()
    await store.add(MANY, VECTORS)
    await store.aclose()
    source = ChromaServer("127.0.0.1", chroma_port, "refused-source")
    await source.open()
    monkeypatch.setattr(chroma_server, "LISTED", -1)
    with pytest.raises(StoreError):
        _ = [block async for block in source.blocks(0)]
    await source.aclose()
