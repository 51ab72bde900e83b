"""Searches described as plain values and recreated from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError
from searchr1_async.search import Search, retrievers
from searchr1_async.testing import HashingEmbedder
from tests import tiny_world

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any name gives the tiny world's embedder."""
    monkeypatch.setattr(retrievers, "make_embedder", lambda embedder: HashingEmbedder())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [
        {"id": f"{kind}-{place}", "title": "", "text": f"{kind} {place} {thing} and more words"}
        for (kind, place), thing in tiny_world.make_facts().items()
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


async def test_a_local_search_made_from_its_description_gives_the_same_answers(corpus: Path, tmp_path: Path) -> None:
    search = Search.local(corpus, path=tmp_path / "index", embedder="words", n_results=2, max_passage_words=3)
    assert search.description is not None
    described = json.loads(json.dumps(search.description))  # as read from a manifest
    again = Search.from_description(described)
    assert again.description == described
    assert again.fingerprint == search.fingerprint
    queries = ["capital barin", "river misel"]
    found = []
    for own in (search, again):
        await own.build()
        async with own:
            with anyio.fail_after(30):
                found.append(await own.search(queries))
    # Beyond the first, passages are equally near, so their order is random.
    assert [passages[0] for passages in found[0]] == [passages[0] for passages in found[1]]
    assert [passages[0].id for passages in found[1]] == ["capital-barin", "river-misel"]
    assert [len(passages) for passages in found[1]] == [2, 2]
    assert all(len(passage.text.split()) <= 3 for passages in found[1] for passage in passages)


@pytest.mark.parametrize(
    "make",
    [
        lambda corpus: Search.local([Passage("1", "", "a river")], embedder="words"),
        lambda corpus: Search.local(corpus, embedder=HashingEmbedder()),
        lambda corpus: Search(HashingEmbedder(), sr.search.RemoteChroma("store", 8000, "wiki", token="secret")),
        lambda corpus: Search.chroma("http://me:secret@store", embedder="words"),
    ],
    ids=["passages in memory", "an embedder", "a token", "a password"],
)
def test_what_is_in_memory_or_secret_is_not_described(make: Callable[[Path], Search], corpus: Path) -> None:
    assert make(corpus).description is None


def test_a_chroma_search_is_described_by_its_address() -> None:
    search = Search.chroma("store", 8001, "wiki", embedder="words", n_results=5)
    assert search.description is not None
    again = Search.from_description(json.loads(json.dumps(search.description)))
    assert again.description == search.description
    assert again.fingerprint == search.fingerprint
    earlier = {"ssl": False, "tenant": "default_tenant", "database": "default_database"}
    assert Search.from_description({**search.description, **earlier}).fingerprint == search.fingerprint
    other = Search.from_description({**search.description, "collection": "other"})
    assert other.fingerprint != search.fingerprint


@pytest.mark.parametrize(
    "description", [{}, {"kind": "oracle"}, {"kind": "local", "corpus": "atlas", "colour": "red"}, {"kind": "chroma"}]
)
def test_a_description_of_no_search_is_refused(description: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="description"):
        Search.from_description(description)
