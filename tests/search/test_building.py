"""Index builds into folders and servers, with the real Gemini client against a stand-in service."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import polars as pl
import pytest

from benchmarks.shared.gemini_stand_in import Fault, GeminiStandIn, StandInSettings
from searchr1_async.cli import main
from searchr1_async.data.corpus import Corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import CorpusError, EmbeddingError, StoreError
from searchr1_async.events import Event, Notice, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.search import Search, passage_embedding
from searchr1_async.search import index as index_builder
from searchr1_async.search.builders import build_index
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import RefusedInput
from searchr1_async.search.gemini import GeminiEmbedder
from searchr1_async.search.index import IndexReport
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma
from searchr1_async.search.stores.chroma_server import RemoteChroma
from tests.tiny_world import child_environment

pytestmark = pytest.mark.anyio

TOTAL = 600
QUICK = PacingSettings(first_pause=0.01, longest_pause=0.02, retry_budget=5.0, max_outage=5.0)


def passages(total: int = TOTAL) -> list[Passage]:
    return [Passage(f"p{n}", f"Title{n}", f"word{n} is number {n} of place{n % 17}") for n in range(total)]


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    rows = [{"id": p.id, "title": p.title, "text": p.text, "more": 1} for p in passages()]
    pl.DataFrame(rows).write_parquet(tmp_path / "corpus.parquet")
    return tmp_path / "corpus.parquet"


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (index_builder, passage_embedding):
        monkeypatch.setattr(module, "WINDOW", 64)


@pytest.fixture
async def service() -> AsyncIterator[GeminiStandIn]:
    async with GeminiStandIn(StandInSettings(dimension=768)) as service:
        yield service


def gemini(service: GeminiStandIn, **settings: Any) -> GeminiEmbedder:
    return GeminiEmbedder(api_key="a-key", base_url=service.base_url, **settings)


def embedded(service: GeminiStandIn) -> list[int]:
    """How often each passage was embedded."""
    return [count for (task, _), count in service.counts.embedded.items() if task == "RETRIEVAL_DOCUMENT"]


async def test_a_server_is_filled_through_faults_and_then_left_alone(
    service: GeminiStandIn, corpus_file: Path, chroma_port: int
) -> None:
    service.settings = StandInSettings(
        retry_after=0.01,
        fault_rates={Fault.UNAVAILABLE: 0.1, Fault.INTERNAL: 0.1, Fault.RESET: 0.1, Fault.ONE_FEWER: 0.1},
    )
    embedder = gemini(service, max_requests=4)
    store = RemoteChroma("127.0.0.1", chroma_port, "filled", create=True)
    events: list[Event] = []
    report = await build_index(corpus_file, store, embedder=embedder, pacing=QUICK, on_event=events.append)
    size = sum(len(f"{p.title}\n{p.text}".encode()) for p in passages())
    assert (report.passages, report.embedded) == (TOTAL, TOTAL)
    assert report.tokens == size // 4
    assert report.cost == pytest.approx(0.15 * report.tokens / 1e6)
    told = [event for event in events if isinstance(event, Notice)]
    assert f"{report.tokens:,} tokens" in told[0].text
    assert "$" in told[0].text
    assert events.index(told[0]) < next(n for n, event in enumerate(events) if isinstance(event, PhaseStarted))
    done = [event.done for event in events if isinstance(event, PhaseAdvanced)]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, TOTAL)
    assert isinstance(events[-1], PhaseEnded)
    assert service.counts.faults.total() > 0

    service.settings = StandInSettings()
    service.forget()
    again = await build_index(corpus_file, store, embedder=embedder, pacing=QUICK)
    assert (again.passages, again.embedded, again.tokens) == (TOTAL, 0, 0)
    assert embedded(service) == []
    search = Search.chroma("127.0.0.1", chroma_port, "filled", embedder=embedder, n_results=1, pacing=QUICK)
    async with search:
        assert [found[0].id for found in await search.search(["word5", "word599"])] == ["p5", "p599"]


async def test_a_corpus_that_grew_costs_what_it_grew_by(
    embedder: Any, chroma_port: int, make_embedder: Callable[..., Any]
) -> None:
    store = RemoteChroma("127.0.0.1", chroma_port, "grown", create=True)
    await build_index(passages(100), store, embedder=embedder)
    more = make_embedder()
    report = await build_index(passages(130), store, embedder=more)
    assert (report.passages, report.embedded) == (130, 30)
    assert sorted(text for batch in more.passage_batches for text in batch) == sorted(
        f"{p.title}\n{p.text}" for p in passages(130)[100:]
    )
    with pytest.raises(StoreError, match="build into another collection"):
        await build_index(passages(131), store, embedder=make_embedder(dimension=8))


CHILD = """
import os, signal, sys
import anyio
from searchr1_async.search import index as index_builder, passage_embedding
from searchr1_async.search.builders import build_index
from searchr1_async.search.gemini import GeminiEmbedder

corpus, target, base_url, window = sys.argv[1:]
index_builder.WINDOW = passage_embedding.WINDOW = int(window)


def kill(done, total):
    if done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)


embedder = GeminiEmbedder(api_key="a-key", base_url=base_url, max_requests=2)
anyio.run(lambda: build_index(corpus, target, embedder=embedder, on_progress=kill))
"""


async def test_a_kill_repeats_only_what_was_in_the_air(
    service: GeminiStandIn, corpus_file: Path, tmp_path: Path
) -> None:
    service.settings = StandInSettings(latency=0.02, max_texts=100)
    command = [sys.executable, "-c", CHILD, str(corpus_file), str(tmp_path / "index"), service.base_url, "64"]
    killed = await anyio.run_process(command, env=child_environment(), check=False, stderr=None)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "index" / "index.json").exists()
    assert len(embedded(service)) >= TOTAL // 2
    steps: list[int] = []
    report = await build_index(
        corpus_file, tmp_path / "index", embedder=gemini(service), on_progress=lambda done, _: steps.append(done)
    )
    assert steps[0] >= TOTAL // 2 - 64
    assert report.embedded == TOTAL - steps[0]
    repeated = [count for count in embedded(service) if count > 1]
    assert len(repeated) <= 64 * 6, "the windows that were in progress"
    assert max(embedded(service)) <= 2
    async with Search.local(corpus_file, path=tmp_path / "index", embedder=gemini(service), n_results=1) as search:
        assert [found[0].id for found in await search.search(["word1", "word599"])] == ["p1", "p599"]


async def test_a_report_says_what_was_built(embedder: Any, tmp_path: Path) -> None:
    search = Search.local(passages(50), path=tmp_path / "index", embedder=embedder, n_results=1)
    report = await build_index(passages(50), tmp_path / "index", embedder=embedder)
    assert (report.passages, report.embedded, report.cost) == (50, 50, None)
    assert "at an unknown price" in str(report)
    embedder.passage_batches.clear()
    async with search:
        assert (await search.search(["word7"]))[0][0].id == "p7"
    again = await build_index(passages(50), tmp_path / "index", embedder=embedder)
    assert (again.passages, again.embedded, embedder.passage_batches) == (50, 0, [])
    assert not embedder.is_open


async def test_it_runs_several_requests_at_once_and_keeps_to_the_embedders_limits(
    embedder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder.max_texts, embedder.max_requests = 40, 3
    embed, running, most = embedder.embed_passages, 0, 0

    async def counted(texts: Sequence[str]) -> Vectors:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        running -= 1
        return await embed(texts)

    monkeypatch.setattr(embedder, "embed_passages", counted)
    await build_index(passages(300), tmp_path / "index", embedder=embedder)
    assert most == 3
    assert max(map(len, embedder.passage_batches)) <= 40


async def test_a_passage_that_is_refused_is_named(
    embedder: Any, make_embedder: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = embedder.embed_passages

    async def refuse(texts: Sequence[str]) -> Vectors:
        if any("word13 " in text for text in texts):
            raise RefusedInput("hashing: HTTP 400")
        return await embed(texts)

    monkeypatch.setattr(embedder, "embed_passages", refuse)
    with pytest.raises(EmbeddingError, match=r"the passage 'p13' of .* is refused") as failure:
        await build_index(passages(64), tmp_path / "index", embedder=embedder)
    assert "word13" not in str(failure.value)
    rest = make_embedder()
    await build_index(passages(64), tmp_path / "index", embedder=rest)
    assert sum(len(batch) for batch in rest.passage_batches) == 64


class Shrinking(Corpus):
    """A corpus whose file is truncated during the read."""

    def batches(self, size: int, start: int = 0) -> Iterator[list[Passage]]:
        for number, batch in enumerate(super().batches(size, start)):
            if number == 3:
                raise CorpusError("the file ends in the middle of a line")
            yield batch


async def test_a_corpus_that_breaks_meanwhile_is_told_as_it_is(embedder: Any, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="in the middle of a line"):
        await build_index(
            Shrinking("passages", lambda: iter([(each.id, each) for each in passages()])),
            tmp_path / "index",
            embedder=embedder,
        )


async def test_control_c_keeps_what_is_stored(service: GeminiStandIn, tmp_path: Path) -> None:
    """A plain Task.cancel, like asyncio.run's."""
    embedder, half = gemini(service, max_requests=1), asyncio.Event()

    def tell(done: int, total: int) -> None:
        if done >= total // 2:
            half.set()

    building = asyncio.ensure_future(build_index(passages(), tmp_path / "index", embedder=embedder, on_progress=tell))
    await half.wait()
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    report = await build_index(passages(), tmp_path / "index", embedder=embedder)
    assert report.embedded <= TOTAL - TOTAL // 2


class Leaky(EmbeddedChroma):
    """Drops one passage per request."""

    async def add(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        await super().add(passages[1:], vectors[1:])


async def test_an_index_that_loses_passages_is_refused(embedder: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds 29 passages, expected 30"):
        await build_index(passages(30), Leaky(tmp_path / "b"), embedder=embedder)


async def test_a_service_that_refuses_ends_the_build_and_what_is_done_is_kept(
    service: GeminiStandIn, tmp_path: Path
) -> None:
    embedder = gemini(service, max_requests=1)

    def refuse(done: int, total: int) -> None:
        if done >= 200:
            service.settings = StandInSettings(keys=("another-key",))

    with pytest.raises(EmbeddingError) as failure:
        await build_index(passages(), tmp_path / "index", embedder=embedder, pacing=QUICK, on_progress=refuse)
    assert "a-key" not in str(failure.value)
    assert "word" not in str(failure.value)
    service.settings = StandInSettings()
    report = await build_index(passages(), tmp_path / "index", embedder=embedder, pacing=QUICK)
    assert report.embedded <= TOTAL - 200
    assert len([count for count in embedded(service) if count > 1]) <= 64 * 4


def test_the_report_in_words() -> None:
    report = IndexReport("a store", 1_000, 900, 12.5, 2_000_000, 0.3)
    assert str(report) == "1,000 passages in a store; 900 embedded in 12.5 s, about 2,000,000 tokens, about $0.30"


async def test_the_command_builds_and_says_what_it_came_to(
    service: GeminiStandIn,
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "a-key")
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", service.base_url)
    arguments = ["index", str(corpus_file), "--path", str(tmp_path / "index"), "--embedder", "gemini-embedding-001"]
    assert await anyio.to_thread.run_sync(main, arguments) == 0
    told = capfd.readouterr()
    assert told.out.startswith("600 passages in Chroma collection 'passages'")
    assert "600 embedded in" in told.out
    assert f"index: {TOTAL} passages" in told.err
    assert "list price" in told.err
    assert json.loads((tmp_path / "index" / "index.json").read_text())["passages"] == TOTAL
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    wrong = ["index", str(corpus_file), "--host", "localhost", "--token-from", "NO_SUCH_TOKEN"]
    assert await anyio.to_thread.run_sync(main, wrong) == 1
    assert "NO_SUCH_TOKEN, which is not set" in capfd.readouterr().err
