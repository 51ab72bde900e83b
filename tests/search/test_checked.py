"""An embedder with malformed output is refused at once, not treated as an outage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import searchr1_async as sr
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import EmbeddingError
from searchr1_async.search import Search
from searchr1_async.search.builders import build_index
from tests.search.conftest import HashingEmbedder

pytestmark = pytest.mark.anyio

AT_ONCE = 8.0
"""Seconds; an outage would be waited for for minutes."""


class Other(HashingEmbedder):
    """Returns malformed vectors, for passages and queries or only for queries."""

    def __init__(self, change: Callable[[np.ndarray], Any], *, only_queries: bool = False) -> None:
        super().__init__(dimension=16)
        self._change = change
        self._only_queries = only_queries
        self.calls = 0

    async def embed_passages(self, texts: Sequence[str]) -> Any:
        self.calls += 1
        return self.embed(texts) if self._only_queries else self._change(self.embed(texts))

    async def embed_queries(self, texts: Sequence[str]) -> Any:
        self.calls += 1
        return self._change(self.embed(texts))


def with_nan(vectors: np.ndarray) -> np.ndarray:
    vectors[:] = np.nan
    return vectors


WRONG = {
    "another dimension": (lambda vectors: vectors[:, :15], r"\[10, 16\] .* returned \[10, 15\]"),
    "fewer vectors": (lambda vectors: vectors[:-1], r"\[10, 16\] .* returned \[9, 16\]"),
    "more vectors": (lambda vectors: np.concatenate([vectors, vectors]), r"returned \[20, 16\]"),
    "one vector": (lambda vectors: vectors[0], r"returned \[16\]"),
    "a batch more": (lambda vectors: vectors[None], r"returned \[1, 10, 16\]"),
    "only NaN": (with_nan, r"NaN or infinity for \d+ of"),
    "nothing": (lambda vectors: None, r"\[10, 16\]"),
    "texts": (lambda vectors: ["a vector"] * len(vectors), "an invalid list"),
    "rows of different lengths": (
        lambda vectors: [row[: 3 + n] for n, row in enumerate(vectors.tolist())],
        "an invalid list",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_building_refuses_it_at_once(passages: list[Passage], tmp_path: Path, wrong: str) -> None:
    change, words = WRONG[wrong]
    embedder = Other(change)
    with anyio.fail_after(AT_ONCE), pytest.raises(EmbeddingError, match=words) as refusal:
        await build_index(passages, tmp_path / "index", embedder=embedder)
    assert "hashing must return" in str(refusal.value)
    assert refusal.value.is_fatal
    assert embedder.calls == 1


async def test_a_search_and_a_compact_index_refuse_it_as_well(passages: list[Passage], tmp_path: Path) -> None:
    embedder = Other(lambda vectors: vectors[:, 1:], only_queries=True)
    with anyio.fail_after(AT_ONCE):
        async with Search.local(passages, path=tmp_path / "index", embedder=embedder) as search:
            with pytest.raises(EmbeddingError, match=r"\[1, 16\] .* returned \[1, 15\]"):
                await search.search(["Luanda"])
        with pytest.raises(EmbeddingError, match=r"returned \[2, 15\]"):
            await sr.search.build_compact_index(
                passages, tmp_path / "compact", embedder=embedder, queries=["capital of Chile", "Moco"]
            )


async def test_one_text_without_a_vector_is_refused_alone(passages: list[Passage], tmp_path: Path) -> None:
    class OneNan(HashingEmbedder):
        def embed(self, texts: Sequence[str]) -> Any:
            vectors = super().embed(texts)
            vectors[["Copenhagen" in text for text in texts]] = np.inf
            return vectors

    with anyio.fail_after(AT_ONCE), pytest.raises(EmbeddingError, match="'Denmark/capital'"):
        await build_index(passages, tmp_path / "index", embedder=OneNan())
    others = [passage for passage in passages if passage.id != "Denmark/capital"]
    async with Search.local(others, path=tmp_path / "others", embedder=OneNan(), n_results=1) as search:
        with anyio.fail_after(AT_ONCE), pytest.raises(EmbeddingError, match="NaN or infinity"):
            await search.search(["Copenhagen"])
        assert (await search.search(["Luanda"]))[0][0].id == "Angola/capital"


@pytest.mark.parametrize(
    "change",
    [lambda vectors: vectors.tolist(), lambda vectors: vectors.astype(np.float64), lambda vectors: tuple(vectors)],
    ids=["lists", "float64", "a tuple of rows"],
)
async def test_numbers_in_another_container_are_taken(
    passages: list[Passage], tmp_path: Path, change: Callable[[np.ndarray], Any]
) -> None:
    async with Search.local(passages, path=tmp_path / "index", embedder=Other(change), n_results=1) as search:
        assert (await search.search(["Luanda is the capital of Angola."]))[0][0].id == "Angola/capital"
