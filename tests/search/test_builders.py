"""Compact index builds: from a corpus or vectors, with queries, and refused inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchr1_async.episodes.types import Passage, Question
from searchr1_async.errors import ConfigurationError, EmbeddingError, QuestionsError, StoreError
from searchr1_async.events import Event, Notice
from searchr1_async.search import Search, passage_embedding
from searchr1_async.search import builders as compact_building
from searchr1_async.search.builders import build_compact_index, needed_bytes
from searchr1_async.search.compact import assembly as build
from searchr1_async.search.compact.files import CompactSettings
from searchr1_async.search.compact.store import CompactStore
from searchr1_async.search.stores import sources as embedded
from tests.search.compact.arrays import Arrays, clustered, contents

pytestmark = pytest.mark.anyio

CORPUS = [Passage(f"p{number}", f"Title {number}", f"word{number} of number {number}") for number in range(700)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


async def test_a_corpus_is_embedded_and_nothing_twice(tmp_path: Path, make_embedder: Callable[..., Any]) -> None:
    embedder, folder = make_embedder(dimension=256), tmp_path / "index"
    steps: list[tuple[int, int]] = []
    report = await build_compact_index(
        CORPUS, folder, embedder=embedder, on_progress=lambda done, total: steps.append((done, total))
    )
    assert steps[-1] == (700, 700)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert sum(len(batch) for batch in embedder.passage_batches) == 700
    assert not embedder.is_open
    assert (report.manifest.passages, report.manifest.metric) == (700, "cosine")
    assert (report.manifest.embedder, report.manifest.embedder_fingerprint) == ("hashing", embedder.fingerprint)
    assert report.manifest.bytes == sum(
        len(content) for name, content in contents(folder).items() if name != "manifest.json"
    )
    assert "700 passages, 256 dimensions in" in str(report)
    embedder.passage_batches.clear()
    before = contents(folder)
    again = await build_compact_index(CORPUS, folder, embedder=embedder)
    assert again.seconds == 0
    assert again.manifest == report.manifest
    assert embedder.passage_batches == []
    assert contents(folder) == before
    async with await Search.open(folder, embedder=embedder, n_results=1) as search:
        found = await search.search([f"word{number} title {number} of number" for number in range(0, 700, 50)])
    assert [answer[0].id for answer in found] == [f"p{number}" for number in range(0, 700, 50)]


async def test_a_quota_that_is_used_up_loses_what_was_in_flight_at_most(
    tmp_path: Path, make_embedder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (embedded, passage_embedding):
        monkeypatch.setattr(module, "WINDOW", 64)
    embedder, folder = make_embedder(dimension=64), tmp_path / "index"
    embedder.max_texts, embedder.max_requests = 64, 1
    steps: list[int] = []

    def stop(done: int, total: int) -> None:
        steps.append(done)
        if done >= 192:
            embedder.failure = EmbeddingError("the quota is used up")

    with pytest.raises(EmbeddingError, match="the quota is used up"):
        await build_compact_index(CORPUS, folder, embedder=embedder, on_progress=stop)
    first = [text for batch in embedder.passage_batches for text in batch]
    with pytest.raises(StoreError, match="unfinished compact index"):
        await Search.open(folder, embedder=embedder)
    embedder.failure = None
    embedder.passage_batches.clear()
    report = await build_compact_index(CORPUS, folder, embedder=embedder)
    assert report.manifest.passages == 700
    second = [text for batch in embedder.passage_batches for text in batch]
    assert len(second) == 700 - steps[-1], "what is in the index is not embedded again"
    assert len(set(first) & set(second)) <= 3 * 64
    assert len(set(first) | set(second)) == 700


async def test_queries_are_texts_or_vectors_or_none(tmp_path: Path, make_embedder: Callable[..., Any]) -> None:
    embedder = make_embedder(dimension=32)
    source = Arrays(clustered(300, 32))
    texts = [f"question {number}?" for number in range(150)]
    asked = await build_compact_index(source, tmp_path / "texts", embedder=embedder, queries=[*texts, " ", "?"])
    assert (asked.manifest.calibration.queries, asked.manifest.calibration.origin) == (150, "queries")
    assert sorted(text for batch in embedder.query_batches for text in batch) == sorted(texts)
    assert asked.manifest.embedder == "hashing"
    given = await build_compact_index(source, tmp_path / "vectors", queries=embedder.embed(texts).astype(np.float64))
    assert given.manifest.embedder is None
    ours, theirs = given.manifest.calibration, asked.manifest.calibration
    assert (ours.probes, ours.candidates, ours.recall) == (theirs.probes, theirs.candidates, theirs.recall)
    none = await build_compact_index(source, tmp_path / "none", queries=[])
    assert (none.manifest.calibration.queries, none.manifest.calibration.origin) == (300, "passages")


async def test_queries_that_cannot_be_used(tmp_path: Path, make_embedder: Callable[..., Any]) -> None:
    source, folder = Arrays(clustered(100, 32)), tmp_path / "index"
    with pytest.raises(ConfigurationError, match="pass the embedder that made the vectors of arrays"):
        await build_compact_index(source, folder, queries=["who"])
    with pytest.raises(ConfigurationError, match="none of the queries is searchable"):
        await build_compact_index(source, folder, queries=["?", ""], embedder=make_embedder(dimension=32))
    with pytest.raises(StoreError, match="arrays holds vectors of dimension 32, but hashing produces dimension 64"):
        await build_compact_index(source, folder, queries=["who"], embedder=make_embedder(dimension=64))
    for queries in (np.zeros((3, 31)), np.zeros(32), np.full((2, 32), np.nan)):
        with pytest.raises(ConfigurationError, match=r"pass finite vectors \[queries, 32\]"):
            await build_compact_index(source, folder, queries=queries)
    assert contents(folder) == {}
    assert not source.is_open


async def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    source, folder = Arrays(clustered(100, 32)), tmp_path / "index"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds files that are not a compact index: use an empty or new folder"):
        await build_compact_index(source, folder)
    (folder / "manifest.json").write_text('{"name": "an application"}')
    with pytest.raises(StoreError, match="not the manifest of a compact index"):
        await build_compact_index(source, folder)
    assert set(contents(folder)) == {"notes.txt", "manifest.json"}
    whole = tmp_path / "whole"
    await build_compact_index(source, whole)
    before = contents(whole)
    with pytest.raises(StoreError, match=r"holds the compact index of arrays, not of others: use another folder"):
        await build_compact_index(Arrays(source.vectors, name="others"), whole)
    assert contents(whole) == before
    # Killed right after writing the manifest.
    (whole / "building").mkdir()
    (whole / "building" / "exact.npz").write_bytes(b"x")
    assert (await build_compact_index(source, whole)).seconds == 0
    assert contents(whole) == before


async def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = Arrays(clustered(100, 32)), tmp_path / "index"
    source.claimed = 21_015_324
    needed = needed_bytes(21_015_324, 32)
    assert needed > 21_015_324 * (2 * 32 + 500)
    monkeypatch.setattr(compact_building, "free_bytes", lambda folder: needed - 1)
    words = f"needs about {needed / 1e9:,.1f} GB more in .*index; {needed / 1e9:,.1f} GB are free: free some space"
    with pytest.raises(StoreError, match=words):
        await build_compact_index(source, folder)
    assert contents(folder) == {}
    assert source.begun_at == []
    monkeypatch.setattr(compact_building, "free_bytes", lambda folder: needed)
    events: list[Event] = []
    with pytest.raises(StoreError, match="returned 100 rows instead of 21,015,324"):
        await build_compact_index(source, folder, on_event=events.append)
    assert any(isinstance(event, Notice) and "GB are free" in event.text for event in events)


async def test_a_disk_that_fails_is_said_with_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    source, folder = Arrays(clustered(100, 32)), tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr(build.Encoder, "write", full)
        with pytest.raises(StoreError, match=r"cannot be written: No space left on device \([\d,]+ bytes are free\)"):
            await build_compact_index(source, folder)
    assert not source.is_open
    report = await build_compact_index(source, folder)
    assert source.begun_at == [0], "the rows were on disk"
    assert CompactStore(folder).fingerprint.startswith(report.manifest.fingerprint)


async def test_a_recall_that_is_not_reached_is_told(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((4_000, 8)).astype(np.float32)  # at most 256 codes per list
    events: list[Event] = []
    settings = CompactSettings(recall=1.0, lists=1)
    report = await build_compact_index(Arrays(vectors), tmp_path / "index", settings=settings, on_event=events.append)
    assert report.manifest.calibration.recall < 1
    (warning,) = [event for event in events if isinstance(event, Notice) and event.is_warning]
    assert "misses the target recall of 100.0%" in warning.text


async def test_of_very_many_queries_enough_are_drawn_the_same_at_each_call(
    tmp_path: Path, make_embedder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_building, "MOST_QUERIES", 40)
    source, embedder = Arrays(clustered(100, 32)), make_embedder(dimension=32)
    texts = [f"question {number}?" for number in range(90)]
    asked = await build_compact_index(source, tmp_path / "texts", embedder=embedder, queries=texts)
    drawn = [text for batch in embedder.query_batches for text in batch]
    assert len(drawn) == len(set(drawn)) == asked.manifest.calibration.queries == 40
    assert max(texts.index(text) for text in drawn) >= 45, "of all of them, not the first"
    given = await build_compact_index(source, tmp_path / "vectors", queries=embedder.embed(texts))
    ours, theirs = given.manifest.calibration, asked.manifest.calibration
    assert (ours.queries, ours.recall, ours.margin) == (40, theirs.recall, theirs.margin)


@pytest.mark.parametrize("kind", ["questions", "without answers", "rows", "file"])
async def test_queries_are_questions_too(kind: str, tmp_path: Path, make_embedder: Callable[..., Any]) -> None:
    texts = [f"word{number} of number {number}" for number in range(0, 700, 100)]
    rows = [{"question": text, "golden_answers": ["x1"]} for text in texts]
    queries: Any = {
        "questions": [Question(text, text, ("x1",)) for text in texts],
        "without answers": [Question(text, text) for text in texts],
        "rows": rows,
        "file": str(tmp_path / "q.jsonl"),
    }[kind]
    (tmp_path / "q.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    embedder = make_embedder(dimension=64)
    report = await build_compact_index(CORPUS, tmp_path / "index", embedder=embedder, queries=queries)
    assert (report.manifest.calibration.queries, report.manifest.calibration.origin) == (7, "queries")


async def test_queries_that_are_none_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    for queries, words in ([3, 4], "row 1 is a int"), ("no such file.jsonl", "the questions file .* does not exist"):
        with pytest.raises(QuestionsError, match=words):
            await build_compact_index(CORPUS, tmp_path / "index", embedder="no such model", queries=queries)  # type: ignore[arg-type]
    assert not (tmp_path / "index").exists()
