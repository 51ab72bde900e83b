"""A compact index proves itself when it is opened, and the call that is named makes a damaged one again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search import Search
from searchr1_async.search.builders import build_compact_index
from searchr1_async.search.compact.files import CompactManifest
from searchr1_async.search.compact.store import CompactStore
from searchr1_async.search.stores.vector_store import DamagedIndexError, record_of
from tests.search.conftest import HashingEmbedder

pytestmark = pytest.mark.anyio


def corpus() -> list[Passage]:
    return [Passage(f"p{number}", "", f"one{number} two{number % 31} words") for number in range(300)]


def embedder() -> HashingEmbedder:
    return HashingEmbedder(dimension=64)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compact") / "index"
    anyio.run(lambda: build_compact_index(corpus(), folder, embedder=embedder()))
    return folder


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "index")
    return tmp_path / "index"


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [zeroed, halved, Path.unlink], ids=["zeroed", "halved", "lost"])
@pytest.mark.parametrize("name", ["vectors.bin", "lists.bin", "codes.faiss", "passages.jsonl"])
async def test_a_damaged_file_is_named_with_the_call_that_makes_the_index_again(
    index: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(index / name)
    with pytest.raises(DamagedIndexError) as refusal:
        await CompactStore(index).open()
    assert str(index / name) in str(refusal.value)
    assert f"await sr.search.build_compact_index(source, {str(index)!r})" in str(refusal.value)


async def test_that_call_makes_it_again(index: Path) -> None:
    zeroed(index / "vectors.bin")
    notices: list[str] = []
    own = embedder()
    await build_compact_index(
        corpus(), index, embedder=own, on_event=lambda event: notices.append(getattr(event, "text", ""))
    )
    assert any("vectors.bin" in text and "rebuilding the index" in text for text in notices)
    async with await Search.open(index, embedder=embedder(), n_results=1) as search:
        found = await search.search([passage.text for passage in corpus()[::50]])
    assert all(answer[0].score > 0.99 for answer in found)


async def test_files_that_do_not_belong_together_are_refused_by_a_search(index: Path) -> None:
    """Sizes and checksums agree, and each vector is that of another passage."""
    path = index / "vectors.bin"
    rows = np.frombuffer(path.read_bytes(), "<f2").reshape(300, 64)
    path.write_bytes(np.roll(rows, 7, axis=0).tobytes())
    manifest = CompactManifest.load(index)
    replace(manifest, files={**manifest.files, "vectors.bin": record_of(path)}).save(index)
    with pytest.raises(StoreError, match=r"it finds \d+ of 16 of its own vectors"):
        await CompactStore(index).open()
