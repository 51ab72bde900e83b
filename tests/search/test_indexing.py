"""Index folders: complete, unfinished, foreign and broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import aclosing, nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest

from searchr1_async.data.corpus import load_corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import CorpusError, EmbeddingError, StoreError
from searchr1_async.search import Search, passage_embedding
from searchr1_async.search import index as index_builder
from searchr1_async.search.index import LocalIndex
from searchr1_async.search.passage_embedding import in_windows, passage_text
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma

pytestmark = pytest.mark.anyio

TOTAL = 50


@pytest.fixture
def many() -> list[Passage]:
    return [Passage(f"p{number}", "Title", f"word{number} is number {number}") for number in range(TOTAL)]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (index_builder, passage_embedding):
        monkeypatch.setattr(module, "WINDOW", 8)
    monkeypatch.setattr(passage_embedding, "PASSAGES_A_REQUEST", 4)
    monkeypatch.setattr(passage_embedding, "PASSAGES_AT_ONCE", 4)


async def test_a_slow_window_delays_no_other(many: list[Passage]) -> None:
    last = (TOTAL - 1) // 8
    released, begun = anyio.Event(), list[int]()

    async def work(number: int, passages: list[Passage]) -> int:
        begun.append(number)
        if number == last:
            released.set()
        if number == 0:
            await released.wait()
        return number

    with anyio.fail_after(20):
        async with aclosing(in_windows(load_corpus(many), 0, 2, work, in_order=False)) as results:
            found = [number async for number in results]
    assert begun == sorted(found) == list(range(last + 1))
    assert found[0] == 1


async def test_a_window_that_fails_ends_those_that_wait(many: list[Passage]) -> None:
    async def work(number: int, passages: list[Passage]) -> int:
        if number == 2:
            raise StoreError("the disk is gone")
        await anyio.sleep_forever()
        return number

    with anyio.fail_after(20), pytest.raises(StoreError, match="the disk is gone"):
        async with aclosing(in_windows(load_corpus(many), 0, 3, work, in_order=False)) as results:
            _ = [number async for number in results]


async def test_it_is_built_once_with_progress(many: list[Passage], embedder: Any, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    search = Search.local(many, path=tmp_path / "index", embedder=embedder, n_results=1)
    await search.build(lambda done, total: steps.append((done, total)))
    assert (steps[0], steps[-1]) == ((0, TOTAL), (TOTAL, TOTAL))
    assert len(steps) == 8
    assert all(later[0] - earlier[0] in (8, TOTAL % 8) for earlier, later in pairwise(steps))
    texts = [text for batch in embedder.passage_batches for text in batch]
    assert sorted(texts) == sorted(f"Title\nword{number} is number {number}" for number in range(TOTAL))
    assert max(map(len, embedder.passage_batches)) == 4
    embedder.passage_batches.clear()
    await search.build(lambda done, total: pytest.fail("nothing was to be built"))
    async with search:
        assert (await search.search(["word17"]))[0][0].id == "p17"
    assert embedder.passage_batches == []


@pytest.mark.parametrize("how", ["a failure", "a cancellation"])
async def test_what_was_begun_is_continued(
    many: list[Passage], make_embedder: Callable[..., Any], tmp_path: Path, how: str
) -> None:
    first = make_embedder()
    first.max_requests = 1  # so that at most three windows are in progress
    search = Search.local(many, path=tmp_path / "index", embedder=first, n_results=1)
    with anyio.CancelScope() as scope:

        def stop_at_8(done: int, total: int) -> None:
            if done >= 8 and how == "a failure":
                first.failure = EmbeddingError("the quota is used up")
            elif done >= 8:
                scope.cancel()

        with pytest.raises(EmbeddingError, match="quota") if how == "a failure" else nullcontext():
            await search.build(stop_at_8)
    assert scope.cancelled_caught == (how == "a cancellation")
    assert not (tmp_path / "index" / "index.json").exists()
    embedder = make_embedder()
    steps: list[int] = []
    search = Search.local(many, path=tmp_path / "index", embedder=embedder, n_results=1)
    await search.build(lambda done, total: steps.append(done))
    assert steps[0] >= 8
    assert sum(len(batch) for batch in embedder.passage_batches) == TOTAL - steps[0]
    async with search:
        for number in (0, 25, 33, TOTAL - 1):
            assert (await search.search([f"word{number}"]))[0][0].id == f"p{number}"


async def test_an_index_begun_by_an_earlier_version_is_continued(
    many: list[Passage], embedder: Any, tmp_path: Path
) -> None:
    """With a journal of vectors, which is not read any more."""
    folder = tmp_path / "index"
    store = EmbeddedChroma(folder, "passages")
    await store.open()
    await store.add(many[:20], embedder.embed([passage_text(passage) for passage in many[:20]]))
    await store.aclose()
    (folder / "journal").mkdir()
    _, identity = LocalIndex(load_corpus(many)).place(embedder)
    (folder / "building.json").write_text(json.dumps(asdict(identity)))
    async with Search.local(many, path=folder, embedder=embedder, n_results=1) as search:
        assert (await search.search(["word49"]))[0][0].id == "p49"
    assert sum(len(batch) for batch in embedder.passage_batches) == TOTAL - 20


async def test_a_damaged_index_is_built_again(many: list[Passage], embedder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    search = Search.local(many, path=folder, embedder=embedder, n_results=1)
    await search.build()
    for file in folder.iterdir():
        if file.name != "index.json":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    async with search:
        assert (await search.search(["word3"]))[0][0].id == "p3"
    assert json.loads((folder / "index.json").read_text())["passages"] == TOTAL


async def test_another_index_or_foreign_files_are_not_touched(
    many: list[Passage], embedder: Any, make_embedder: Callable[..., Any], tmp_path: Path
) -> None:
    await Search.local(many, path=tmp_path / "index", embedder=embedder).build()
    for other in (
        Search.local(many[1:], path=tmp_path / "index", embedder=embedder),
        Search.local(many, path=tmp_path / "index", embedder=make_embedder(dimension=64)),
    ):
        with pytest.raises(StoreError, match="use another path"):
            await other.connect()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="not an index of this package"):
        await Search.local(many, path=tmp_path / "mine", embedder=embedder).connect()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


async def test_two_builders_make_one_index(
    many: list[Passage], make_embedder: Callable[..., Any], tmp_path: Path
) -> None:
    embedders = [make_embedder(), make_embedder()]
    async with anyio.create_task_group() as group:
        for one in embedders:
            group.start_soon(Search.local(many, path=tmp_path / "index", embedder=one).build)
    assert sorted(bool(one.passage_batches) for one in embedders) == [False, True]


async def test_the_default_folder_is_named_by_content(
    many: list[Passage], embedder: Any, make_embedder: Callable[..., Any]
) -> None:
    folders = {
        LocalIndex(load_corpus(passages)).place(one)[0].path
        for passages in (many, many[1:])
        for one in (embedder, make_embedder(dimension=64))
    }
    assert len(folders) == 4
    assert LocalIndex(load_corpus(many)).place(make_embedder())[0].path in folders


async def test_a_bad_corpus_is_refused_before_anything_is_embedded(embedder: Any, tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    rows = [{"id": str(number % 30), "title": "", "text": "words"} for number in range(31)]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(CorpusError, match=r"line 31 has the same id '0' as .*line 1"):
        await Search.local(file, embedder=embedder).connect()
    assert embedder.passage_batches == []


async def test_a_folder_that_cannot_be_written(many: list[Passage], embedder: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        await Search.local(many, path=tmp_path / "file" / "index", embedder=embedder).connect()


def test_the_title_stands_in_front_unless_the_text_names_it() -> None:
    assert passage_text(Passage("1", "Moon", "It orbits.")) == "Moon\nIt orbits."
    assert passage_text(Passage("1", "Moon", "The Moon orbits.")) == "The Moon orbits."
    assert passage_text(Passage("1", "", "It orbits.")) == "It orbits."
