"""Relative paths are resolved at the call: a later `chdir` changes nothing, and nothing is built twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import searchr1_async as sr
from searchr1_async.data.wikipedia_index import fetch_index
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError
from searchr1_async.search import Search
from searchr1_async.search.embedders import SentenceTransformerEmbedder
from searchr1_async.search.stores.vector_store import lasting_name

pytestmark = pytest.mark.anyio


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Starts in one folder and moves to another when called."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda: monkeypatch.chdir(tmp_path / "there")


async def test_an_index_is_built_once(
    passages: list[Passage], embedder: Any, tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    search = Search.local(passages, path="index", embedder=embedder, n_results=1, cache_path="answers.sqlite")
    await search.build()
    elsewhere()
    async with search:
        assert (await search.search(["Luanda"]))[0][0].id == "Angola/capital"
    assert sum(len(batch) for batch in embedder.passage_batches) == len(passages)
    assert (tmp_path / "here" / "answers.sqlite").exists()
    assert list((tmp_path / "there").iterdir()) == []


async def test_what_is_opened_later_is_what_was_meant(
    passages: list[Passage], embedder: Any, tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    await sr.search.build_index(passages, "index", embedder=embedder)
    await sr.search.build_compact_index(passages, "compact", embedder=embedder)
    np.save("vectors.npy", embedder.embed([passage.text for passage in passages]))
    opened = [await Search.open(name, embedder=embedder) for name in ("index", "compact")]
    stores = [sr.search.EmbeddedChroma("index"), sr.search.CompactStore("compact")]
    sources = [sr.search.VectorFiles("vectors.npy", passages)]
    elsewhere()
    for search in opened:
        async with search:
            assert (await search.search(["Luanda"]))[0][0].id == "Angola/capital"
    for store in stores:
        await store.open()
        assert await store.count() == len(passages)
        await store.aclose()
    for source in sources:
        assert (await source.open()).count == len(passages)
        await source.aclose()
    assert list((tmp_path / "there").iterdir()) == []


def test_an_embedders_folder_is_the_one_at_the_call(
    passages: list[Passage], tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    model = tmp_path / "here" / "model"
    model.mkdir()
    (model / "modules.json").write_text("[]")
    Path("corpus.jsonl").write_text(json.dumps({"id": "1", "title": "", "text": "words"}))
    embedder = SentenceTransformerEmbedder("model")
    search = Search.local("corpus.jsonl", path="index", embedder="model")
    chroma = Search.chroma(embedder="model")
    elsewhere()
    assert embedder._location == str(model)
    assert search.description is not None
    assert search.description["embedder"] == lasting_name(model) == str(model)
    assert search.description["path"] == str(tmp_path / "here" / "index")
    assert chroma.description is not None
    assert chroma.description["embedder"] == str(model)


async def test_home_is_expanded(
    passages: list[Passage], embedder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    await sr.search.build_index(passages, "~/index", embedder=embedder)
    assert (tmp_path / "index" / "index.json").exists()


@pytest.mark.parametrize("path", ["", b"index", 3])
async def test_what_is_no_path_is_refused_by_the_name_of_its_argument(
    passages: list[Passage], embedder: Any, path: Any, elsewhere: Callable[[], None]
) -> None:
    with pytest.raises(ConfigurationError, match="path is "):
        Search.local(passages, path=path, embedder=embedder)
    with pytest.raises(ConfigurationError, match="place is "):
        await Search.open(path, embedder=embedder)
    with pytest.raises(ConfigurationError, match="folder is "):
        await sr.search.build_compact_index(passages, path, embedder=embedder)
    with pytest.raises(ConfigurationError, match="folder is "):
        await fetch_index(path)
