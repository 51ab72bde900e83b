"""The Chroma stores: a folder, and a real server process."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import chromadb
import numpy as np
import pytest
from chromadb.config import Settings

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search import Search
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.stores import EmbeddedChroma, RemoteChroma, Store
from searchr1_async.search.stores.chroma.layout import check_collection_name, read_answer

pytestmark = pytest.mark.anyio


@pytest.fixture
def collection() -> str:
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture(params=["embedded", "server"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, collection: str) -> AsyncIterator[Store]:
    made: Store
    if request.param == "embedded":
        made = EmbeddedChroma(tmp_path / "chroma", collection)
    else:
        made = RemoteChroma("127.0.0.1", request.getfixturevalue("chroma_port"), collection, create=True)
    await made.open()
    yield made
    await made.aclose()


async def test_adds_counts_and_finds(store: Store, passages: list[Passage], embedder: Any) -> None:
    vectors = embedder.embed([passage.text for passage in passages])
    await store.open()
    await store.add(passages, vectors)
    await store.add(passages[:2], vectors[:2])
    assert await store.count() == len(passages)
    found = await store.query(vectors, 3)
    assert [row[0].id for row in found] == [passage.id for passage in passages]
    assert all(len(row) == 3 for row in found)
    best = found[0][0]
    assert (best.title, best.text) == (passages[0].title, passages[0].text)
    assert best.score == pytest.approx(1, abs=1e-3)
    assert found[0][1].score == pytest.approx(
        float(vectors[0] @ vectors[[p.id for p in passages].index(found[0][1].id)]), abs=1e-3
    )


async def test_more_than_there_is(store: Store, passages: list[Passage], embedder: Any) -> None:
    vectors = embedder.embed([passage.text for passage in passages])
    await store.add(passages[:2], vectors[:2])
    (found,) = await store.query(vectors[:1], 10)
    assert len(found) == 2


async def test_another_dimension_is_named(store: Store, passages: list[Passage], embedder: Any) -> None:
    await store.add(passages, embedder.embed([passage.text for passage in passages]))
    with pytest.raises(StoreError, match="another embedder"):
        await store.query(np.ones((1, 7), np.float32), 1)


async def test_it_reopens(store: Store, passages: list[Passage], embedder: Any) -> None:
    await store.add(passages, embedder.embed([passage.text for passage in passages]))
    await store.aclose()
    with pytest.raises(StoreError, match="not open"):
        await store.count()
    await store.open()
    assert await store.count() == len(passages)


async def test_a_collection_made_anew_is_looked_up_again(
    chroma_port: int, collection: str, passages: list[Passage], embedder: Any
) -> None:
    vectors = embedder.embed([passage.text for passage in passages])
    writer = RemoteChroma("127.0.0.1", chroma_port, collection, create=True)
    await writer.open()
    await writer.add(passages[:1], vectors[:1])
    async with Search.chroma("127.0.0.1", chroma_port, collection, embedder=embedder, n_results=1) as search:
        assert (await search.search(["capital of Egypt"]))[0][0].id == passages[0].id
        admin = await chromadb.AsyncHttpClient("127.0.0.1", chroma_port, settings=Settings(anonymized_telemetry=False))
        await admin.delete_collection(collection)
        await writer.add(passages, vectors)
        assert (await search.search(["capital of Egypt"]))[0][0].id == "Egypt/capital"
        await admin._server.__aexit__(None, None, None)  # type: ignore[attr-defined]
    await writer.aclose()


async def test_documents_without_titles(chroma_port: int, collection: str, embedder: Any) -> None:
    """The layout of the original `wiki_embeddings`: an id and a document, no metadata, Chroma's own distance."""
    admin = await chromadb.AsyncHttpClient("127.0.0.1", chroma_port, settings=Settings(anonymized_telemetry=False))
    made = await admin.create_collection(collection, embedding_function=None)
    texts = ["Luanda is the capital of Angola.", "Cairo is the capital of Egypt."]
    await made.add(ids=["7", "8"], documents=texts, embeddings=embedder.embed(texts))
    async with Search.chroma("127.0.0.1", chroma_port, collection, embedder=embedder) as search:
        (found,) = await search.search(["Cairo is the capital of Egypt."])
    assert [(passage.id, passage.title, passage.text) for passage in found] == [
        ("8", "", texts[1]),
        ("7", "", texts[0]),
    ]
    vectors = embedder.embed(texts)
    assert [passage.score for passage in found] == pytest.approx([1, float(vectors[0] @ vectors[1])], abs=1e-3)
    await admin._server.__aexit__(None, None, None)  # type: ignore[attr-defined]


async def test_a_missing_collection_is_named_at_once(chroma_port: int, embedder: Any) -> None:
    with pytest.raises(StoreError, match=r"'no-such-thing' at 127\.0\.0\.1.*does not exist"):
        async with Search.chroma("127.0.0.1", chroma_port, "no-such-thing", embedder=embedder):
            pass


async def test_a_server_that_is_not_there(embedder: Any, unused_port: int) -> None:
    search = Search.chroma("127.0.0.1", unused_port, embedder=embedder, headers={"X-Chroma-Token": "secret"})
    for _ in range(2):
        with pytest.raises(PassingFault, match="does not answer") as caught:
            await search.open()
        assert "secret" not in str(caught.value)


async def test_hundreds_at_once_through_the_server(
    chroma_port: int, collection: str, passages: list[Passage], embedder: Any
) -> None:
    store = RemoteChroma("127.0.0.1", chroma_port, collection, create=True)
    await store.open()
    await store.add(passages, embedder.embed([passage.text for passage in passages]))
    countries = sorted({passage.title for passage in passages})
    async with Search(embedder, store, n_results=1) as search, anyio.create_task_group() as group:

        async def ask(number: int) -> None:
            country = countries[number % len(countries)]
            ((found,),) = await search.search([f"{country} {country} {country} capital capital {number}"])
            assert found.id == f"{country}/capital"

        for number in range(300):
            group.start_soon(ask, number)
    assert search.statistics.batches < 10


@pytest.mark.parametrize("name", ["ab", "", "-abc", "abc-", "a b c", "é" * 5, "x" * 513])
def test_names_that_chroma_does_not_take(name: str) -> None:
    with pytest.raises(StoreError, match="collection name"):
        check_collection_name(name)


def test_an_answer_without_columns() -> None:
    answer = {"ids": [["a"], []], "documents": None, "metadatas": [[None], []], "distances": [[None], []]}
    assert read_answer(answer, "cosine") == ((Passage("a", "", "", 0.0),), ())


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
