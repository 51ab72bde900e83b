"""Detection of the index at a path or URL, and errors if there is none."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError, CorpusError, EmbeddingError, StoreError
from searchr1_async.search import Search
from searchr1_async.search.builders import build_compact_index, build_index
from searchr1_async.search.compact.store import CompactStore
from searchr1_async.search.index import LocalIndex
from searchr1_async.search.retrievers import find_retriever
from searchr1_async.search.stores import vector_store
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma
from searchr1_async.search.stores.chroma_server import RemoteChroma
from tests.search.compact.arrays import Arrays, clustered

pytestmark = pytest.mark.anyio

PASSAGES = [Passage(f"p{number}", f"Title {number}", f"word{number} of number {number}") for number in range(20)]


async def compact(folder: Path, embedder: Any = None) -> Path:
    await build_compact_index(Arrays(clustered(40, 16)), folder, embedder=embedder)
    return folder


async def chroma(folder: Path, *names: str) -> Path:
    for name in names:
        store = EmbeddedChroma(folder, name)
        await store.open()
        await store.add(PASSAGES, clustered(20, 16))
        await store.aclose()
    return folder


async def test_a_compact_index(tmp_path: Path, make_embedder: Callable[..., Any]) -> None:
    embedder = make_embedder(dimension=16)
    folder = await compact(tmp_path / "index", embedder)
    search = await Search.open(folder, embedder=embedder, n_results=2)
    assert isinstance(search.source, CompactStore)
    assert search.embedder is embedder
    async with search:
        assert len((await search.search(["anything"]))[0]) == 2
    # The index names a custom embedder, which cannot be recreated by name.
    with pytest.raises((ConfigurationError, EmbeddingError), match="hashing"):
        await Search.open(folder)
    with pytest.raises(
        ConfigurationError, match=r"made with the embedder hashing, not with other: their vectors cannot"
    ):
        await Search.open(folder, embedder=make_embedder("other", dimension=16))


async def test_a_compact_index_that_does_not_know_its_embedder(tmp_path: Path, embedder: Any) -> None:
    folder = await compact(tmp_path / "index")
    with pytest.raises(ConfigurationError, match=r"does not name the embedder of its vectors: pass embedder=…"):
        await Search.open(folder)
    search = await Search.open(folder, embedder=embedder)
    with pytest.raises(StoreError, match="vectors of dimension 16, but hashing produces dimension 1024"):
        await search.connect()


async def test_a_compact_index_is_described_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = await compact(tmp_path / "index")
    search = await Search.open(folder, embedder="gemini-embedding-001", n_results=4)
    assert search.description is not None
    again = Search.from_description(search.description)
    assert again.fingerprint == search.fingerprint
    assert again.settings.n_results == 4
    monkeypatch.chdir(tmp_path)
    relative = await Search.open("index", embedder="gemini-embedding-001", n_results=4)
    assert relative.description == search.description
    assert isinstance(relative.source, CompactStore)
    assert relative.source.folder == folder


async def test_an_unfinished_and_a_broken_compact_index(tmp_path: Path, embedder: Any) -> None:
    (tmp_path / "begun" / "building").mkdir(parents=True)
    with pytest.raises(StoreError, match="unfinished compact index"):
        await Search.open(tmp_path / "begun", embedder=embedder)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="is corrupt"):
        await Search.open(str(tmp_path / "broken"), embedder=embedder)


async def test_an_index_of_this_package_and_chroma_folders(tmp_path: Path, make_embedder: Callable[..., Any]) -> None:
    embedder = make_embedder(dimension=64)
    local = Search.local(PASSAGES, path=tmp_path / "local", embedder=embedder, n_results=1)
    await local.build()
    search = await Search.open(tmp_path / "local", embedder=embedder, n_results=1)
    assert isinstance(search.source, EmbeddedChroma)
    async with search:
        assert (await search.search(["word7"]))[0][0].id == "p7"
    with pytest.raises(ConfigurationError, match="not with other"):
        await Search.open(tmp_path / "local", embedder=make_embedder("other"))
    own = make_embedder(dimension=16)
    await chroma(tmp_path / "chroma", "wiki")
    search = await Search.open(tmp_path / "chroma", embedder=own)
    async with search:
        assert len((await search.search(["anything"], 5))[0]) == 5
    with pytest.raises(ConfigurationError, match="does not name the embedder of its vectors"):
        await Search.open(tmp_path / "chroma")
    await chroma(tmp_path / "chroma", "other")
    with pytest.raises(
        ConfigurationError, match=r"holds the collections other, wiki|holds the collections wiki, other"
    ):
        await Search.open(tmp_path / "chroma", embedder=own)
    search = await Search.open(tmp_path / "chroma", embedder=own, collection="other")
    assert isinstance(search.source, EmbeddedChroma)
    assert "'other'" in search.source.name


async def test_a_folder_without_an_index(tmp_path: Path, embedder: Any) -> None:
    with pytest.raises(StoreError, match=r"holds no index: it has neither manifest\.json nor chroma\.sqlite3$"):
        await Search.open(tmp_path, embedder=embedder)
    with pytest.raises(StoreError, match="no compact index"):
        Search.from_description({"kind": "compact", "folder": str(tmp_path), "embedder": None})


async def test_a_corpus_is_searched_as_before(tmp_path: Path, embedder: Any) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "1", "contents": "\\"Title\\"\\nA text."}\n')
    for place in (path, str(path)):
        search = await Search.open(place, embedder=embedder)
        assert isinstance(search.source, LocalIndex)
        assert isinstance((await find_retriever(place, embedder, None, None)).store, LocalIndex)
    with pytest.raises(CorpusError, match="missing"):
        await Search.open(tmp_path / "missing.jsonl", embedder=embedder)
    with pytest.raises(CorpusError):
        await Search.open("no such corpus", embedder=embedder)


async def test_a_chroma_server_wants_its_collection_and_embedder(embedder: Any) -> None:
    search = await Search.open("http://localhost:9", embedder=embedder, collection="wiki")
    assert isinstance(search.source, RemoteChroma)
    with pytest.raises(ConfigurationError, match="does not name the embedder of its vectors"):
        await Search.open("http://localhost:9", collection="wiki")


async def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_store, "OPENING_TRIES", 1)  # waits seconds for a service that is starting
    with pytest.raises(StoreError, match="localhost:9"):
        await Search.open("http://localhost:9")


async def test_a_broken_chroma_folder(tmp_path: Path, embedder: Any) -> None:
    (tmp_path / "chroma.sqlite3").write_bytes(b"no database")
    with pytest.raises((StoreError, ConfigurationError), match=str(tmp_path)):
        await Search.open(tmp_path, embedder=embedder)
    (tmp_path / "chroma.sqlite3").unlink()
    sqlite3.connect(tmp_path / "chroma.sqlite3").close()
    (tmp_path / "chroma.sqlite3").touch()
    with pytest.raises((StoreError, ConfigurationError), match=str(tmp_path)):
        await Search.open(tmp_path, embedder=embedder)


async def test_an_index_that_is_not_finished_is_not_searched(
    passages: list[Passage], embedder: Any, tmp_path: Path
) -> None:
    await build_index(passages, tmp_path / "index", embedder=embedder)
    (tmp_path / "index" / "index.json").rename(tmp_path / "index" / "building.json")
    with pytest.raises(
        StoreError, match=r"not finished: await sr\.search\.build_index\(corpus, '.*', embedder='hashing'\)"
    ):
        await Search.open(tmp_path / "index", embedder=embedder)
