"""The Chroma stores: a folder, and a real server process."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import chromadb
import numpy as np
import pytest
from chromadb.config import Settings

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import SearchError, StoreError
from searchr1_async.search import Search
from searchr1_async.search.faults import RefusedInput
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.stores.chroma import check_collection_name, read_answer
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma
from searchr1_async.search.stores.chroma_server import RemoteChroma
from searchr1_async.search.stores.vector_store import Store
from tests.search.conftest import ChromaProcess

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


async def test_which_ids_are_missing(store: Store, passages: list[Passage], embedder: Any) -> None:
    """Exactly, in pages smaller than what is asked for, with ids given twice."""
    assert await store.missing(["a", "b", "a"]) == {"a", "b"}
    await store.add(passages, embedder.embed([passage.text for passage in passages]))
    ids = [passage.id for passage in passages]
    store._page = 3  # type: ignore[attr-defined]
    assert await store.missing(ids) == frozenset()
    assert await store.missing([*ids, "x", ids[0], "y z", "x"]) == {"x", "y z"}
    assert await store.missing([]) == frozenset()


async def test_adding_in_pages_with_an_id_given_twice(store: Store) -> None:
    """The last one stays, within a page as over two."""
    store._page = 4  # type: ignore[attr-defined]
    vectors = np.eye(10, 10, dtype=np.float32)
    names = ["a", "b", "a", "c", "d", "e", "f", "b", "g", "h"]
    passages = [Passage(name, "", f"text {number}") for number, name in enumerate(names)]
    await store.add(passages, vectors)
    assert await store.count() == 8
    found = await store.query(vectors[[2, 7, 3]], 1)
    assert [(row[0].id, row[0].text) for row in found] == [("a", "text 2"), ("b", "text 7"), ("c", "text 3")]


async def test_fingerprint_and_dimension_follow_what_is_in(
    store: Store, passages: list[Passage], embedder: Any
) -> None:
    vectors = embedder.embed([passage.text for passage in passages])
    assert store.dimension is None
    seen = [store.fingerprint]
    await store.add(passages[:3], vectors[:3])
    assert store.dimension == vectors.shape[1]
    seen.append(store.fingerprint)
    await store.add(passages[3:], vectors[3:])
    seen.append(store.fingerprint)
    await store.count()
    seen.append(store.fingerprint)
    assert len(set(seen)) == 4
    await store.aclose()
    with pytest.raises(StoreError, match="not open"):
        _ = store.fingerprint
    assert store.dimension is None
    await store.open()
    assert store.fingerprint == seen[-1]
    assert store.dimension == vectors.shape[1]


async def test_vectors_that_cannot_be_searched_for(store: Store, passages: list[Passage], embedder: Any) -> None:
    vectors = embedder.embed([passage.text for passage in passages])
    await store.add(passages, vectors)
    broken = vectors[:2].copy()
    broken[1, 0] = np.nan
    with pytest.raises(RefusedInput, match="non-finite"):
        await store.query(broken, 1)
    assert await store.query(vectors[:0], 1) == ()


async def test_text_that_is_no_unicode_is_named_and_not_told(store: Store) -> None:
    with pytest.raises(StoreError) as caught:
        await store.add([Passage("a", "", "Luanda \ud800")], np.ones((1, 3), np.float32))
    assert "Luanda" not in str(caught.value)
    with pytest.raises(StoreError, match="2 vectors for 1 passages"):
        await store.add([Passage("a", "", "text")], np.ones((2, 3), np.float32))


async def test_it_reopens(store: Store, passages: list[Passage], embedder: Any) -> None:
    await store.add(passages, embedder.embed([passage.text for passage in passages]))
    await store.aclose()
    with pytest.raises(StoreError, match="not open"):
        await store.count()
    await store.open()
    assert await store.count() == len(passages)


async def test_a_collection_made_anew_is_not_taken_for_the_old_one(
    chroma_port: int, collection: str, passages: list[Passage], embedder: Any
) -> None:
    vectors = embedder.embed([passage.text for passage in passages])
    store = RemoteChroma("127.0.0.1", chroma_port, collection, create=True)
    await store.open()
    await store.add(passages[:1], vectors[:1])
    admin = await chromadb.AsyncHttpClient("127.0.0.1", chroma_port, settings=Settings(anonymized_telemetry=False))
    await admin.delete_collection(collection)
    with pytest.raises(StoreError, match="was recreated since it was opened") as refusal:
        await store.query(vectors[:1], 1)
    assert refusal.value.is_fatal
    await admin._server.__aexit__(None, None, None)  # type: ignore[attr-defined]
    await store.aclose()
    await store.open()
    assert await store.count() == 0
    await store.aclose()


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


async def test_the_layout_of_the_recipe_with_titles_in_the_documents(chroma_port: int, collection: str) -> None:
    """Chroma's default distance over vectors of any length; the wiki-18 documents, their titles in quotes, no metadata."""
    admin = await chromadb.AsyncHttpClient("127.0.0.1", chroma_port, settings=Settings(anonymized_telemetry=False))
    made = await admin.create_collection(collection, embedding_function=None)
    documents = [
        '"Luanda"\nThe capital of Angola.',
        '"An unfinished quotation\nand more',
        '"Only a title"\n ',
        "One line",
    ]
    vectors = np.array([[3, 0], [0, 5], [1, 1], [2, 2]], np.float32)
    await made.add(ids=["0", "1", "2", "3"], documents=documents, embeddings=vectors)
    await admin._server.__aexit__(None, None, None)  # type: ignore[attr-defined]
    store = RemoteChroma("127.0.0.1", chroma_port, collection)
    await store.open()
    (found,) = await store.query(np.array([[3, 0]], np.float32), 4)
    assert found[0] == Passage("0", "Luanda", "The capital of Angola.", 1.0)
    assert {passage.id: (passage.title, passage.text) for passage in found[1:]} == {
        own_id: ("", documents[int(own_id)]) for own_id in "123"
    }
    assert found[-1].id == "1"
    assert {passage.id: passage.score for passage in found} == pytest.approx({"0": 1, "2": -1.5, "3": -1.5, "1": -16})
    await store.aclose()


async def test_a_missing_collection_is_named_at_once(chroma_port: int, embedder: Any) -> None:
    with pytest.raises(StoreError, match=r"'no-such-thing' at 127\.0\.0\.1.*does not exist"):
        async with Search.chroma("127.0.0.1", chroma_port, "no-such-thing", embedder=embedder):
            pass


async def test_a_server_that_is_not_there(embedder: Any, unused_port: int) -> None:
    store = RemoteChroma("127.0.0.1", unused_port, headers={"X-Chroma-Token": "secret"})
    search = Search(embedder, store, pacing=PacingSettings(first_pause=0.01))
    for _ in range(2):
        with pytest.raises(SearchError, match="does not answer") as caught:
            await search.connect()
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
    assert search.statistics.querying.requests < 100


@pytest.mark.parametrize("name", ["ab", "", "-abc", "abc-", "a b c", "é" * 5, "x" * 513])
def test_names_that_chroma_does_not_take(name: str) -> None:
    with pytest.raises(StoreError, match="collection name"):
        check_collection_name(name)


def test_an_answer_without_columns() -> None:
    answer = {"ids": [["a"], []], "documents": None, "metadatas": [[None], []], "distances": [[None], []]}
    assert read_answer(answer, "cosine") == ((Passage("a", "", "", 0.0),), ())


def test_a_title_in_the_metadata_leaves_the_document_whole() -> None:
    document = '"A quotation."\nWhat follows.'
    for title in ("T", ""):
        answer = {"ids": [["a"]], "documents": [[document]], "metadatas": [[{"title": title}]], "distances": [[0.25]]}
        assert read_answer(answer, "cosine") == ((Passage("a", title, document, 0.75),),)


@pytest.fixture
def hold_folder() -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Makes another process hold a Chroma folder until its input ends."""
    holders: list[subprocess.Popen[bytes]] = []

    def hold(folder: Path) -> subprocess.Popen[bytes]:
        code = (
            "import sqlite3, sys; held = sqlite3.connect(sys.argv[1], isolation_level=None); "
            "held.execute('BEGIN EXCLUSIVE'); print('held', flush=True); sys.stdin.readline()"
        )
        command = [sys.executable, "-c", code, str(folder / "chroma.sqlite3")]
        holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert holders[-1].stdout is not None
        assert holders[-1].stdout.readline() == b"held\n"
        return holders[-1]

    yield hold
    for holder in holders:
        holder.kill()
        holder.communicate()


async def test_a_query_of_a_folder_that_another_process_holds(
    tmp_path: Path, passages: list[Passage], embedder: Any, hold_folder: Callable[[Path], subprocess.Popen[bytes]]
) -> None:
    """Chroma waits and says nothing; the caller's deadline ends the call, and the store goes on when it is let go."""
    vectors = embedder.embed([passage.text for passage in passages])
    store = EmbeddedChroma(tmp_path)
    await store.open()
    await store.add(passages, vectors)
    holder = hold_folder(tmp_path)
    with anyio.move_on_after(0.2) as deadline:
        await store.query(vectors[:1], 1)
    assert deadline.cancelled_caught
    await anyio.to_thread.run_sync(holder.communicate)
    ((found,),) = await store.query(vectors[:1], 1)
    assert found.id == passages[0].id
    await store.aclose()


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# Collections of earlier versions, whose distance is in their metadata.

OLD_CONFIGURATION = (
    '{"hnsw_configuration": {"space": "l2", "ef_search": 10, "M": 16, "_type": "HNSWConfigurationInternal"}}'
)
"""As chromadb 0.5.23 writes it beside the metadata, whatever the collection measures."""


def make_old(folder: Path, vectors: Any, metadata: dict[str, str] | None, configuration: str | None) -> None:
    """A folder as chromadb 0.5 (with a configuration) or 0.4 (without) leaves it."""
    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    try:
        collection = client.create_collection("passages", embedding_function=None, metadata=metadata)
        ids = [f"p{number}" for number in range(len(vectors))]
        collection.add(ids=ids, embeddings=vectors, documents=ids)
    finally:
        client.close()  # pyright: ignore[reportAttributeAccessIssue]
    with sqlite3.connect(folder / "chroma.sqlite3") as database:
        database.execute("UPDATE collections SET schema_str = NULL, config_json_str = ?", [configuration])
        database.execute(
            "INSERT INTO segment_metadata (segment_id, key, str_value) "
            "SELECT s.id, m.key, m.str_value FROM segments s JOIN collection_metadata m ON m.collection_id = s.collection "
            "WHERE s.scope = 'VECTOR'"
        )


@pytest.mark.parametrize("configuration", [OLD_CONFIGURATION, None], ids=["0.5", "0.4"])
@pytest.mark.parametrize("space", ["cosine", "ip", "l2", None])
async def test_scores_of_an_old_folder_are_of_its_own_distance(
    tmp_path: Path, space: str | None, configuration: str | None
) -> None:
    vectors = np.random.default_rng(3).standard_normal((40, 8)).astype(np.float32)
    make_old(tmp_path, vectors, None if space is None else {"hnsw:space": space}, configuration)
    store = EmbeddedChroma(tmp_path)
    await store.open()
    ((best, *others),) = await store.query(vectors[:1], 5)
    await store.aclose()
    for passage in (best, *others):
        one, other = vectors[0], vectors[int(passage.id[1:])]
        cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
        expected = {"cosine": cosine, "ip": one @ other}.get(space or "l2", 1 - ((one - other) ** 2).sum() / 2)
        assert passage.score == pytest.approx(expected, abs=1e-4)


async def test_scores_of_an_old_collection_behind_a_server_are_the_cosine(tmp_path: Path) -> None:
    vectors = np.random.default_rng(3).standard_normal((40, 8)).astype(np.float32)
    make_old(tmp_path / "data", vectors, {"hnsw:space": "cosine"}, OLD_CONFIGURATION)
    server = ChromaProcess(tmp_path)
    server.start()
    store = RemoteChroma("127.0.0.1", server.port, "passages")
    try:
        await anyio.to_thread.run_sync(server.wait)
        await store.open()
        ((_, second),) = await store.query(vectors[:1], 2)
    finally:
        await store.aclose()
        server.kill()
    one, other = vectors[0], vectors[int(second.id[1:])]
    cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
    assert second.score == pytest.approx(cosine, abs=1e-4)


async def test_what_a_new_collection_was_configured_for_wins_over_its_metadata(tmp_path: Path) -> None:
    vectors = np.random.default_rng(3).standard_normal((40, 8)).astype(np.float32)
    for name, configured in {"one": "ip", "two": "l2", "three": "cosine"}.items():
        client = chromadb.PersistentClient(tmp_path / name, settings=Settings(anonymized_telemetry=False))
        try:
            settings: Any = {"hnsw": {"space": configured}}
            client.create_collection(
                "passages", embedding_function=None, metadata={"hnsw:space": "cosine"}, configuration=settings
            ).add(ids=[f"p{number}" for number in range(40)], embeddings=vectors)
        finally:
            client.close()  # pyright: ignore[reportAttributeAccessIssue]
        store = EmbeddedChroma(tmp_path / name)
        await store.open()
        ((best,),) = await store.query(vectors[:1], 1)
        await store.aclose()
        other = vectors[int(best.id[1:])]
        expected = {"ip": vectors[0] @ other}.get(configured, 1.0)
        assert best.score == pytest.approx(expected, abs=1e-4)
