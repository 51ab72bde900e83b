"""What serving a search costs: the same searches in process, by ``Search.open`` of its address, and by ``/retrieve``.

    python -m benchmarks serving --work WORK

Searches the built-in corpus in a Chroma folder, without a cache and with no query twice. The service is a process of its own that
shares the cores with its clients. By default the embedder hashes words and costs next to nothing, so that the cost of serving shows;
`--embedder all-MiniLM-L6-v2` takes the usual one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import anyio
import numpy as np
import polars as pl

import searchr1_async as sr
from benchmarks.serving.service import make_search
from benchmarks.shared.processes import child_environment, command_of
from benchmarks.shared.report import write_result

AT_ONCE = 64
SECONDS = 4.0
"""Of each measurement, after a first request."""
WAYS = ("in process", "Search.open of its address", "/retrieve, one query a request", "/retrieve, 64 queries a request")

Search = Callable[[list[str]], Awaitable[object]]


async def measure(search: Search, texts: list[str], at_once: int, batch: int) -> tuple[float, float]:
    """Queries a second, and the 99th percentile of a request's seconds."""
    numbers = itertools.count()
    latencies: list[float] = []

    async def once() -> None:
        began = time.monotonic()
        await search([f"{texts[n % len(texts)]} {n}" for n in itertools.islice(numbers, batch)])
        latencies.append(time.monotonic() - began)

    async def ask() -> None:
        while time.monotonic() < end:
            await once()

    await once()  # connects, and has Chroma read its index
    latencies.clear()
    begin = time.monotonic()
    end = begin + SECONDS

    async with anyio.create_task_group() as tasks:
        for _ in range(at_once):
            tasks.start_soon(ask)
    return batch * len(latencies) / (time.monotonic() - begin), float(np.quantile(latencies, 0.99))


async def compare(work: Path, embedder: str, texts: list[str]) -> list[dict[str, object]]:
    """Every way, one after another, while the same service stands by."""
    await make_search(work, embedder).build()
    child = await asyncio.create_subprocess_exec(
        *command_of("benchmarks.serving.service", str(work), embedder),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(),
    )
    assert child.stdin is not None
    assert child.stdout is not None
    measured: list[tuple[float, float]] = []
    try:
        address = (await child.stdout.readline()).decode().strip()
        async with make_search(work, embedder) as near:
            measured.append(await measure(near.search, texts, AT_ONCE, 1))
        async with await sr.Search.open(address, cache_entries=0) as far:
            measured.append(await measure(far.search, texts, AT_ONCE, 1))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), raise_for_status=True) as session:

            async def retrieve(queries: list[str]) -> object:
                asked = {"queries": queries, "topk": 3, "return_scores": True}
                async with session.post(f"{address}/retrieve", json=asked) as answer:
                    return await answer.json()

            measured.append(await measure(retrieve, texts, AT_ONCE, 1))
            measured.append(await measure(retrieve, texts, 4, 64))
    finally:
        child.stdin.close()
        await child.wait()
    first = measured[0][0]
    return [
        {"embedder": embedder, "way": way, "queries_per_second": rate, "ratio": rate / first, "p99_ms": 1e3 * p99}
        for way, (rate, p99) in zip(WAYS, measured, strict=True)
    ]


async def run(work: Path, embedder: str) -> None:
    texts = [question.question for question in sr.load_questions("atlas", split="train")]
    rows = await compare(work, embedder, texts)
    table = pl.DataFrame(rows)
    lines = ["| embedder | way | queries/s | of in process | p99 of a request |", "| --- | --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['embedder']} | {row['way']} | {row['queries_per_second']:,.0f} | {row['ratio']:.2f} | {row['p99_ms']:,.0f} ms |"
        for row in rows
    ]
    setup = f"{AT_ONCE} requests at once (4 where each has 64 queries), {SECONDS:g} s a row, 3 passages a query, nothing cached."
    write_result("serving", "What serving a search costs", [setup, "\n".join(lines)], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the indexes, kept for the next time")
    parser.add_argument("--embedder", default="hashed", help="hashed, or a sentence-transformers model (%(default)s)")
    options = parser.parse_args()
    asyncio.run(run(options.work, options.embedder))
