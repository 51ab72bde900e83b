"""A local Chroma index is checked when it is opened: what was zeroed, cut or lost is named, with the call that builds it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import chromadb
import numpy as np
import pytest
from chromadb.config import Settings

from searchr1_async.episodes.types import Passage
from searchr1_async.search import Search
from searchr1_async.search.builders import build_index
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma
from searchr1_async.search.stores.vector_store import DamagedIndexError, refuse_unproven
from tests.search.conftest import HashingEmbedder

pytestmark = pytest.mark.anyio

TOTAL = 1_100
"""Chroma writes vector files after 1,000 changes."""
DIMENSION = 48


def passages(count: int = TOTAL) -> list[Passage]:
    words = [f"w{number}" for number in range(97)]
    return [
        Passage(f"p{number}", "", f"id{number} {words[number % 97]} {words[number * 7 % 89]}")
        for number in range(count)
    ]


def embedder() -> HashingEmbedder:
    return HashingEmbedder(dimension=DIMENSION)


def own_search(folder: Path) -> Search:
    return Search.local(passages(), path=folder, embedder=embedder(), n_results=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "index"
    anyio.run(lambda: build_index(passages(), folder, embedder=embedder()))
    assert (segment(folder) / "index_metadata.pickle").exists()
    return folder


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "index")
    return tmp_path / "index"


def segment(folder: Path) -> Path:
    return next(folder.glob("*-*-*-*-*"))


def zero(name: str, first: float = 0.0, last: float = 1.0) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = segment(folder) / name
        content = bytearray(path.read_bytes())
        begin, end = int(first * len(content)), int(last * len(content))
        content[begin:end] = bytes(end - begin)
        path.write_bytes(content)

    return damage


def halve(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = segment(folder) / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (segment(folder) / name).unlink()


def lose_all(folder: Path) -> None:
    shutil.rmtree(segment(folder))


def zero_vectors(folder: Path) -> None:
    """Of every second row; links and labels stay."""
    path = segment(folder) / "data_level0.bin"
    content = bytearray(path.read_bytes())
    header = (segment(folder) / "header.bin").read_bytes()
    size = int.from_bytes(header[28:36], "little")
    begin, end = size - 8 - 4 * DIMENSION, size - 8
    for row in range(0, len(content) // size, 2):
        content[row * size + begin : row * size + end] = bytes(end - begin)
    path.write_bytes(content)


DAMAGES = {
    "vectors zeroed": (zero("data_level0.bin"), "data_level0.bin"),
    "half of the vectors zeroed": (zero_vectors, "data_level0.bin"),
    "the end zeroed": (zero("data_level0.bin", 0.9), "data_level0.bin"),
    "vectors halved": (halve("data_level0.bin"), "data_level0.bin"),
    "vectors lost": (lose("data_level0.bin"), "data_level0.bin"),
    "links zeroed": (zero("link_lists.bin"), "link_lists.bin"),
    "links zeroed in part": (zero("link_lists.bin", 0.5), "link_lists.bin"),
    "links halved": (halve("link_lists.bin"), "link_lists.bin"),
    "links lost": (lose("link_lists.bin"), "link_lists.bin"),
    "header zeroed": (zero("header.bin"), "header.bin"),
    "labels lost": (lose("index_metadata.pickle"), "index_metadata.pickle"),
    "labels halved": (halve("index_metadata.pickle"), "index_metadata.pickle"),
    "all vector files lost": (lose_all, "header.bin"),
    "database halved": (lambda folder: halve_file(folder / "chroma.sqlite3"), "chroma.sqlite3"),
    "database lost": (lambda folder: (folder / "chroma.sqlite3").unlink(), "chroma.sqlite3"),
}


def halve_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_is_damaged_is_named_before_chroma_loads_it(index: Path, damage: str) -> None:
    harm, file = DAMAGES[damage]
    harm(index)
    with pytest.raises(DamagedIndexError) as refusal:
        await own_search(index).connect()
    assert file in str(refusal.value)
    assert refusal.value.is_fatal
    assert f"await sr.search.build_index(corpus, {str(index)!r}, embedder='hashing')" in str(refusal.value)


async def test_a_flipped_bit_is_found_by_the_checksums(index: Path) -> None:
    path = segment(index) / "data_level0.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedIndexError, match=r"data_level0\.bin is not the file"):
        await own_search(index).connect()


@pytest.mark.parametrize("how", ["build_index", "Search.build"])
async def test_the_call_that_is_named_builds_it_again(index: Path, how: str) -> None:
    zero("link_lists.bin")(index)
    search = own_search(index)
    with pytest.raises(DamagedIndexError):
        await search.connect()
    if how == "build_index":
        texts: list[str] = []
        report = await build_index(
            passages(), index, embedder=embedder(), on_event=lambda event: texts.append(getattr(event, "text", ""))
        )
        assert report.embedded == TOTAL
        assert any("link_lists.bin" in text and "rebuilding it" in text for text in texts)
    else:
        await search.build()
    async with search:
        found = await search.search([passage.text for passage in passages()[::100]])
    assert all(answers[0].score > 0.999 for answers in found)


async def test_a_whole_index_opens_again_and_again(index: Path) -> None:
    before = {path.name: path.read_bytes() for path in segment(index).iterdir()}
    for _ in range(2):
        async with own_search(index) as search:
            assert (await search.search([passages()[500].text]))[0][0].score > 0.999
    assert {path.name: path.read_bytes() for path in segment(index).iterdir()} == before


async def test_what_chroma_itself_changed_since_is_not_damage(index: Path) -> None:
    store = EmbeddedChroma(index)
    await store.open()
    more = passages(TOTAL + 1_200)[TOTAL:]
    await store.add(more, embedder().embed([passage.text for passage in more]))
    await store.aclose()
    await store.open()
    assert await store.count() == TOTAL + 1_200
    await store.aclose()


async def test_a_corpus_of_equal_passages_is_not_damage(tmp_path: Path) -> None:
    equal = [Passage(f"p{number}", "", "the same words") for number in range(TOTAL)]
    await build_index(equal, tmp_path / "index", embedder=embedder())
    async with Search.local(equal, path=tmp_path / "index", embedder=embedder()) as search:
        assert (await search.search(["the same words"]))[0][0].score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("every", [1, 3, TOTAL])
async def test_passages_without_a_word_that_the_embedder_knows_are_not_damage(tmp_path: Path, every: int) -> None:
    """Their vectors are zeros, as many as there may be; checksums tell them from vectors that were zeroed."""
    mute = ZeroEmbedder(every)
    corpus = passages()
    for _ in range(2):
        await build_index(corpus, tmp_path / "index", embedder=mute)
        async with Search.local(corpus, path=tmp_path / "index", embedder=mute, n_results=1) as search:
            (found,) = await search.search([corpus[1].text])
            assert len(found) == 1
    zero_vectors(tmp_path / "index")
    if every > 1:
        with pytest.raises(DamagedIndexError, match=r"data_level0\.bin is not the file"):
            await Search.local(corpus, path=tmp_path / "index", embedder=mute).connect()


class ZeroEmbedder(HashingEmbedder):
    """Knows no word of every so many passages."""

    def __init__(self, every: int) -> None:
        super().__init__(dimension=DIMENSION)
        self.every = every

    def embed(self, texts: Any) -> Any:
        vectors = super().embed(texts)
        vectors[[int(text.split()[0].removeprefix("id")) % self.every == 0 for text in texts]] = 0
        return vectors


# Folders that others made, of which nothing was recorded.


def foreign(folder: Path, space: str) -> np.ndarray:
    vectors = np.random.default_rng(5).standard_normal((600, DIMENSION)).astype(np.float32) * 3
    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    settings: Any = {"hnsw": {"space": space, "batch_size": 50, "sync_threshold": 100}}
    try:
        collection = client.create_collection("passages", embedding_function=None, configuration=settings)
        ids = [f"p{number}" for number in range(len(vectors))]
        for start in range(0, len(ids), 130):
            part = slice(start, start + 130)
            collection.add(ids=ids[part], embeddings=vectors[part], documents=ids[part])
        # Rows that stay in the files without an id, and ids whose vectors are other ones in the log.
        collection.delete(ids=ids[::7])
        collection.upsert(ids=ids[1:40], embeddings=-vectors[1:40], documents=ids[1:40])
    finally:
        client.close()  # pyright: ignore[reportAttributeAccessIssue]
    return vectors


@pytest.mark.parametrize("space", ["cosine", "l2", "ip"])
async def test_a_folder_of_others_opens(tmp_path: Path, space: str) -> None:
    foreign(tmp_path / "theirs", space)
    store = EmbeddedChroma(tmp_path / "theirs")
    await store.open()
    assert store.dimension == DIMENSION
    await store.aclose()


async def test_a_store_that_does_not_find_its_own_vectors_is_refused(index: Path) -> None:
    store = EmbeddedChroma(index)
    await store.open()
    other = np.random.default_rng(0).standard_normal((20, DIMENSION)).astype(np.float32)
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    own = embedder().embed([passage.text for passage in passages()[:20]])
    with pytest.raises(DamagedIndexError, match="finds 0 of 20 of its own vectors"):
        await refuse_unproven(store, other, "cosine", "advice")
    with pytest.raises(DamagedIndexError, match="finds 9 of 29 of its own vectors"):
        await refuse_unproven(store, np.concatenate([other, own[:9]]), "cosine", "advice")
    await refuse_unproven(store, own, "cosine", "advice")
    await store.aclose()
