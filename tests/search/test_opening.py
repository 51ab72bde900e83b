"""A search that opens beside other work: calls wait for it, and its errors end the work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from searchr1_async.boundary.waits import REPORT_AFTER
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import EmbeddingError, SearchError, ungrouped
from searchr1_async.search.search import Search
from tests.late_embedder import LateEmbedder
from tests.tiny_world import tasks_left
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def late() -> LateEmbedder:
    return LateEmbedder()


async def test_calls_wait_until_it_is_open(passages: list[Passage], late: LateEmbedder) -> None:
    built: list[int] = []
    search = Search.local(passages, embedder=late, n_results=1)
    found: dict[str, str] = {}

    async def ask(country: str) -> None:
        found[country] = (await search.search([f"is the capital of {country}."]))[0][0].id

    async with search.opening(lambda done, total: built.append(done)), anyio.create_task_group() as tasks:
        tasks.start_soon(ask, "Egypt")
        tasks.start_soon(ask, "Chile")
        await anyio.wait_all_tasks_blocked()
        assert not search.is_open
        late.may_open.set()
        await search.opened()
        assert search.is_open
    assert found == {"Egypt": "Egypt/capital", "Chile": "Chile/capital"}
    assert built[-1] == len(passages)
    assert not search.is_open
    with pytest.raises(SearchError, match="not open"):
        await search.search(["one"])
    assert tasks_left() == set()


async def test_what_it_cannot_open_ends_the_block(passages: list[Passage], late: LateEmbedder) -> None:
    late.failure = EmbeddingError("no such model")
    search = Search.local(passages, embedder=late)

    async def ask() -> None:
        with ungrouped():
            async with search.opening():
                late.may_open.set()
                await search.search(["is the capital of Egypt."])

    with pytest.raises(EmbeddingError, match="no such model"):
        await ask()
    assert not search.is_open
    assert tasks_left() == set()


async def test_a_block_that_ends_first_ends_the_opening(
    passages: list[Passage], late: LateEmbedder, tmp_path: Path
) -> None:
    search = Search.local(passages, path=tmp_path / "index", embedder=late)
    async with search.opening():
        await anyio.wait_all_tasks_blocked()
    assert not search.is_open
    assert not (tmp_path / "index" / "index.json").exists()
    assert tasks_left() == set()
    late.may_open.set()
    async with search.opening():
        assert (await search.search(["is the capital of Egypt."]))[0][0].id == "Egypt/capital"


async def test_it_stays_open_for_another_user(passages: list[Passage], late: LateEmbedder) -> None:
    search = Search.local(passages, embedder=late)
    late.may_open.set()
    async with search:
        async with search.opening():
            await search.opened()
        assert await search.search(["is the capital of Egypt."])
    assert not search.is_open


async def test_another_user_who_leaves_early_does_not_end_the_opening(
    passages: list[Passage], late: LateEmbedder
) -> None:
    search = Search.local(passages, embedder=late)

    async def use() -> None:
        async with search:
            pytest.fail("it is not open")

    async with search.opening():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(use)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert not late.closings
        late.may_open.set()
        assert await search.search(["is the capital of Egypt."])


class EmptyStore:
    """Needs neither files nor threads."""

    name, fingerprint, dimension, max_queries, max_requests = "empty", "empty", None, 10, 4

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def count(self) -> int:
        return 0

    async def query(self, vectors: Any, n_results: int) -> Any:
        return ((),) * len(vectors)


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualTimeLoop})])
async def test_a_long_wait_is_told_once(late: LateEmbedder, asks: bool) -> None:
    loop = asyncio.get_running_loop()
    told: list[float] = []
    search = Search(late, EmptyStore())
    began = loop.time()

    def tell(text: str) -> None:
        assert text == "waiting until the search is open"
        told.append(loop.time() - began)

    open_late: Callable[[], object] = late.may_open.set
    async with search.opening(tell=tell), anyio.create_task_group() as tasks:
        loop.call_later(60, open_late)
        await anyio.sleep(10)
        for query in ("one", "two", "one") if asks else ():
            tasks.start_soon(search.search, [query])
        await anyio.sleep(100)
    assert told == ([10 + REPORT_AFTER] if asks else [])
