"""Work in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import anyio
import anyio.to_thread

Result = TypeVar("Result")
Item = TypeVar("Item")


async def in_thread(function: Callable[[], Result]) -> Result:
    """Runs a function in a thread and waits for it even when cancelled, so that its files are free afterwards.

    A long function should call ``anyio.from_thread.check_cancelled()`` regularly. The task group makes a plain ``Task.cancel``
    (Ctrl-C) reach it: ``to_thread.run_sync`` alone would return at once and abandon the thread.
    """
    results: list[Result] = []
    failures: list[Exception] = []

    async def work() -> None:
        try:
            results.append(await anyio.to_thread.run_sync(function))
        except Exception as error:
            failures.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(work)
    if failures:
        raise failures[0]
    return results[0]


def prepared_ahead(items: Iterator[Item]) -> Generator[Item]:
    """The same items, each prepared in a thread while the previous one is used."""
    with ThreadPoolExecutor(1, "searchr1-ahead") as pool:
        coming = pool.submit(_next_of, items)
        while found := coming.result():
            coming = pool.submit(_next_of, items)
            yield found[0]


def _next_of(items: Iterator[Item]) -> tuple[Item] | None:
    try:
        return (next(items),)
    except StopIteration:
        return None


def usable_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
